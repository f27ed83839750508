"""Rotary embedding in plain torch (Su et al., arXiv 2104.09864), half-split as in Llama."""

import torch
from torch import Tensor

from gen_fast.ops.norm.reference import rms_norm_backward


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float, *, inplace: bool = False
) -> Tensor:
    """Normalise each head of `x` if `norm` is given, then rotate. See `op.rope`."""
    if norm is not None:
        x = torch.nn.functional.rms_norm(x, (x.shape[-1],), None, eps) * norm
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_backward(
    grad: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float
) -> Tensor:
    """Gradient [T, N, D] of `x`, which is needed only if there is a norm."""
    turned = rope(grad, cos, -sin, None, eps)  # the transpose of a rotation is the rotation back
    if norm is None:
        return turned
    assert x is not None
    return rms_norm_backward(turned, x, norm, eps)
