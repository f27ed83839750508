"""Products with frozen weights: plain ones, packed ones, and quantised ones.

On a CPU oneDNN multiplies fastest when a weight lies in blocks of its own choosing, and otherwise
brings it into them on every call. A frozen weight is brought into them once.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from gen_fast.model.choices import INT4, INT8
from gen_fast.ops.qlinear import (
    ROTATED,
    dequantize_weight,
    int4_linear,
    int4_linear_backward,
    int8_linear,
    quantize_rows,
    quantize_weight,
    quantize_weight_int8,
    rotate_rows,
    unpack_int8,
)

# The batch that the layout is chosen for: a full one on a CPU (token_budget.py).
_ROWS = 2048


@dataclass(frozen=True)
class Int4Weight:
    """A weight [out, in] of 4 bits in groups of 32: see gen_fast.ops.qlinear."""

    kind: ClassVar[str] = INT4
    blocks: Tensor  # [out / 16, in / 32, 320] uint8

    @classmethod
    def of(cls, weight: Tensor) -> "Int4Weight":
        """The nearest to `weight` [out, in]."""
        return cls(quantize_weight(weight))

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.blocks.nbytes

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as a matrix."""
        return dequantize_weight(self.blocks, dtype)


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out, in] of 8 bits, of which each output has a scale: see gen_fast.ops.qlinear.

    Its inputs are rotated (`rotate_rows`), and so are the rows that it meets: y = (x R) (W R)ᵀ.
    """

    kind: ClassVar[str] = INT8
    blocks: Tensor  # [out / 16, in / 4, 64] int8
    scale: Tensor  # [out] float32

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        """The nearest to `weight` [out, in], whose inputs are rotated here."""
        return cls(*quantize_weight_int8(rotate_rows(weight.float())))

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.blocks.nbytes + self.scale.nbytes

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as a matrix for rows that are not rotated."""
        weight = unpack_int8(self.blocks).float() * self.scale.unsqueeze(1)
        return rotate_rows(weight).to(dtype)


@dataclass(frozen=True)
class QuantizedRows:
    """Rows that are ready for an Int8Weight: rotated, and quantised to 8 bits."""

    q: Tensor  # [T, in] int8
    scale: Tensor  # [T] float32
    dtype: torch.dtype  # of what they are multiplied to

    @classmethod
    def of(cls, x: Tensor) -> "QuantizedRows":
        """Those of x [T, in]."""
        return cls(*quantize_rows(x, ROTATED), x.dtype)


# What `linear` multiplies, and by what.
Rows = Tensor | QuantizedRows
Weight = Tensor | Int4Weight | Int8Weight


def is_packed(weight: Weight) -> bool:
    """Whether `pack` has laid it out."""
    return isinstance(weight, Tensor) and weight.is_mkldnn


def can_pack(weight: Weight) -> bool:
    """Whether oneDNN can multiply by such a weight here: on a CPU made for its dtype."""
    if not isinstance(weight, Tensor):
        return False  # its own layout is all that it has
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        # Elsewhere the packed product is an error, and the plain one slow but right.
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


@overload
def pack(weight: Tensor) -> Tensor: ...
@overload
def pack(weight: Weight) -> Weight: ...
def pack(weight: Weight) -> Weight:
    """A weight [out, in] as `linear` multiplies it fastest: in oneDNN's layout, or as it was.

    The numbers and bytes are the same. What oneDNN multiplies has bits that do not depend on the
    number of threads, unlike torch's plain product.
    """
    if not can_pack(weight):
        return weight
    assert isinstance(weight, Tensor)
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return packed


def linear(x: Rows, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weightᵀ [in, out], plus bias [out]. Quantised rows go with an Int8Weight.

    Both are frozen: a gradient reaches x alone. Through rows that are quantised here it goes as if
    they had not been rounded.
    """
    if isinstance(weight, Int8Weight):
        if isinstance(x, Tensor) and torch.is_grad_enabled() and x.requires_grad:
            through: Tensor = _Int8Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
            return through
        return _int8_linear(x, weight, bias)
    assert isinstance(x, Tensor)
    if isinstance(weight, Int4Weight):
        return int4_linear(x, weight.blocks, bias)
    if not weight.is_mkldnn:
        return plain_linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _PackedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _packed_linear(x, weight, bias)


def times(grad: Tensor, weight: Weight) -> Tensor:
    """grad [T, out] times weight [out, in]: the gradient of `linear`'s x."""
    if isinstance(weight, Int4Weight):
        return int4_linear_backward(grad, weight.blocks)
    if isinstance(weight, Int8Weight):
        return grad @ weight.dequantized(grad.dtype)
    # oneDNN's layout is for the other product. To copy a weight out of it costs as much as some
    # hundred rows of the product, and the copy is gone at once.
    return grad @ (weight.to_dense() if weight.is_mkldnn else weight)


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _int8_linear(x: Rows, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    rows = QuantizedRows.of(x) if isinstance(x, Tensor) else x
    return int8_linear(rows.q, rows.scale, weight.blocks, weight.scale, bias, dtype=rows.dtype)


class _FrozenLinear(torch.autograd.Function):
    """The gradient of a product with a frozen weight that torch does not differentiate."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return times(grad, ctx.weight), None, None


class _PackedLinear(_FrozenLinear):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # not a tensor that save_for_backward takes
        return _packed_linear(x, weight, bias)


class _Int8Linear(_FrozenLinear):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _int8_linear(x, weight, bias)
