"""Products with frozen weights: plain ones, packed ones, and quantised ones.

On a CPU oneDNN multiplies fastest when a weight lies in blocks of its own choosing, and otherwise
brings it into them on every call. A frozen weight is brought into them once.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from gen_fast.model.choices import FP8, GROUP_BITS, INT8
from gen_fast.ops.dense import by_onednn, product
from gen_fast.ops.qlinear import (
    ROTATED,
    Epilogue,
    dequantize_groups,
    dequantize_weight_fp8,
    fp8_linear,
    group_linear,
    group_linear_backward,
    int8_linear,
    int8_weight,
    quantize_groups,
    quantize_rows,
    quantize_weight_fp8,
    quantize_weight_int8,
)

# The batch that the layout is chosen for: a full one on a CPU (token_budget.py).
_ROWS = 2048


@dataclass(frozen=True)
class GroupWeight:
    """A weight [out, in] of 4 or 8 bits in groups of 32: see gen_fast.ops.qlinear."""

    kind: str  # one of GROUP_BITS
    blocks: Tensor  # [out / 16, in / 32, 320 or 576] uint8

    @classmethod
    def of(cls, weight: Tensor, kind: str) -> "GroupWeight":
        """The nearest to `weight` [out, in]."""
        return cls(kind, quantize_groups(weight, GROUP_BITS[kind]))

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.blocks.nbytes

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as a matrix."""
        return dequantize_groups(self.blocks, dtype)


@dataclass(frozen=True)
class QuantizedRows:
    """Rows that are ready for an Int8Weight or Fp8Weight: quantised as its `row_format` says."""

    q: Tensor  # [T, in] int8 or float8_e4m3fn
    scale: Tensor  # [T] float32
    dtype: torch.dtype  # of what they are multiplied to

    @classmethod
    def of(cls, x: Tensor, row_format: str) -> "QuantizedRows":
        """Those of x [T, in]."""
        return cls(*quantize_rows(x, row_format), x.dtype)

    def epilogue(self, weight_scale: Tensor, bias: Tensor | None) -> Epilogue:
        """What becomes of their sums with a weight whose outputs have the scales [out]."""
        return Epilogue(self.scale, weight_scale, bias, self.dtype)


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out, in] of 8 bits, of which each output has a scale: see gen_fast.ops.qlinear.

    Its inputs are rotated (`rotate_rows`), and so are the rows that it meets: y = (x R) (W R)ᵀ.
    """

    kind: ClassVar[str] = INT8
    row_format: ClassVar[str] = ROTATED
    blocks: Tensor  # [out / 16, in / 4, 64] int8
    scale: Tensor  # [out] float32

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        """The nearest to `weight` [out, in], whose inputs are rotated here."""
        return cls(*quantize_weight_int8(weight.float(), ROTATED))

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.blocks.nbytes + self.scale.nbytes

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as a matrix for rows that are not rotated."""
        return int8_weight(self.blocks, self.scale, dtype=dtype)

    def multiply(self, rows: QuantizedRows, bias: Tensor | None) -> Tensor:
        """rows [T, in] times the weight, transposed, plus bias."""
        return int8_linear(rows.q, self.blocks, rows.epilogue(self.scale, bias))


@dataclass(frozen=True)
class Fp8Weight:
    """A weight [out, in] in e4m3, of which each output has a scale: see gen_fast.ops.qlinear."""

    kind: ClassVar[str] = FP8
    row_format: ClassVar[str] = "fp8"
    q: Tensor  # [out, in] float8_e4m3fn
    scale: Tensor  # [out] float32

    @classmethod
    def of(cls, weight: Tensor) -> "Fp8Weight":
        """The nearest to `weight` [out, in]."""
        return cls(*quantize_weight_fp8(weight))

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.q.nbytes + self.scale.nbytes

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as a matrix."""
        return dequantize_weight_fp8(self.q, self.scale).to(dtype)

    def multiply(self, rows: QuantizedRows, bias: Tensor | None) -> Tensor:
        """rows [T, in] times the weight, transposed, plus bias."""
        return fp8_linear(rows.q, self.q, rows.epilogue(self.scale, bias))


# What `linear` multiplies, and by what.
Rows = Tensor | QuantizedRows
Weight = Tensor | GroupWeight | Int8Weight | Fp8Weight


def row_format(weight: Weight) -> str | None:
    """What the rows that a weight meets are quantised to; None if they are not."""
    return weight.row_format if isinstance(weight, Int8Weight | Fp8Weight) else None


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
    """x [T, in] times weightᵀ [in, out], plus bias [out]. Quantised rows go with their weights.

    Both are frozen: a gradient reaches x alone. Where one is needed, rows stay as they are before
    weights that round them otherwise.
    """
    if isinstance(weight, Int8Weight | Fp8Weight):
        if isinstance(x, Tensor) and torch.is_grad_enabled() and x.requires_grad:
            exact: Tensor = _DequantizedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
            return exact
        return _rounded_linear(x, weight, bias)
    assert isinstance(x, Tensor)
    if isinstance(weight, GroupWeight):
        return group_linear(x, weight.blocks, bias)
    if (weight.is_mkldnn or by_onednn(x)) and torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return product(x, weight, bias)


def times(grad: Tensor, weight: Weight) -> Tensor:
    """grad [T, out] times weight [out, in]: the gradient of `linear`'s x."""
    if isinstance(weight, GroupWeight):
        return group_linear_backward(grad, weight.blocks)
    if isinstance(weight, Int8Weight | Fp8Weight):
        return product(grad, weight.dequantized(grad.dtype).T)
    # oneDNN's layout is for the other product. To copy a weight out of it costs as much as some
    # hundred rows of the product, and the copy is gone at once.
    return product(grad, (weight.to_dense() if weight.is_mkldnn else weight).T)


def _rounded_linear(x: Rows, weight: Int8Weight | Fp8Weight, bias: Tensor | None) -> Tensor:
    rows = QuantizedRows.of(x, weight.row_format) if isinstance(x, Tensor) else x
    return weight.multiply(rows, bias)


class _FrozenLinear(torch.autograd.Function):
    """The gradient of a product with a frozen weight that torch does not differentiate."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return times(grad, ctx.weight), None, None


class _OneDnnLinear(_FrozenLinear):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # packed, it is not a tensor that save_for_backward takes
        return product(x, weight, bias)


class _DequantizedLinear(_FrozenLinear):
    """The exact function of a weight that rounds rows and its exact gradient: they are not rounded.

    Where LLM2Vec-Gen's training starts the loss is so steep that rounded rows turn its gradient
    elsewhere: 200 steps later it is 24% higher over int8 (bench/README.md, "Training step").
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight | Fp8Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight.dequantized(x.dtype), bias)
