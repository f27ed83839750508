"""Products with frozen weights: plain ones, packed ones, and quantised ones.

On a CPU oneDNN multiplies fastest when a weight lies in blocks of its own choosing, and otherwise
brings it into them on every call. A frozen weight is brought into them once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from gen_fast.ops.qlinear import (
    dequantize_weight,
    int4_linear,
    int4_linear_backward,
    quantize_weight,
)

# The batch that the layout is chosen for: a full one on a CPU (token_budget.py).
_ROWS = 2048


@dataclass(frozen=True)
class Int4Weight:
    """A weight [out, in] of 4 bits in groups of 32: see gen_fast.ops.qlinear."""

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


# What `linear` multiplies by.
Weight = Tensor | Int4Weight


def is_packed(weight: Weight) -> bool:
    """Whether `pack` has laid it out."""
    return isinstance(weight, Tensor) and weight.is_mkldnn


def can_pack(weight: Weight) -> bool:
    """Whether oneDNN can multiply by such a weight here: on a CPU made for its dtype."""
    if isinstance(weight, Int4Weight):
        return False  # its own layout is all that it has
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        # Elsewhere the packed product is an error, and the plain one slow but right.
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """`weight` [out, in] in oneDNN's layout: the same numbers and bytes, for `linear` only."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return packed


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weightᵀ [in, out], plus bias [out].

    Both are frozen: a gradient reaches x alone.
    """
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
    # oneDNN's layout is for the other product. To copy a weight out of it costs as much as some
    # hundred rows of the product, and the copy is gone at once.
    return grad @ (weight.to_dense() if weight.is_mkldnn else weight)


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # not a tensor that save_for_backward takes
        return _packed_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return times(grad, ctx.weight), None, None
