"""Products with frozen weights.

On a CPU oneDNN multiplies fastest when a weight lies in blocks of its own choosing, and otherwise
brings it into them on every call. A frozen weight is brought into them once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

# The batch that the layout is chosen for: a full one on a CPU (token_budget.py).
_ROWS = 2048


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can multiply by such a weight here: on a CPU made for its dtype."""
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weightᵀ [in, out], plus bias [out]; `weight` plain or packed.

    Both are frozen: a gradient reaches x alone.
    """
    if not weight.is_mkldnn:
        return plain_linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _PackedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _packed_linear(x, weight, bias)


def times(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [T, out] times weight [out, in], plain or packed: the gradient of `linear`'s x."""
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
