"""RMSNorm in plain torch (Zhang & Sennrich, arXiv 1910.07467), as Llama computes it."""

import torch
from torch import Tensor

from gen_fast.ops.qlinear.reference import quantize_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension: x / rms(x) · weight, computed in float32 at least."""
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual)."""
    total = residual.add_(x) if inplace else x + residual
    return rms_norm(total, weight, eps), total


def add_rms_norm_backward(
    grad_normed: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Gradient [T, h] of x, which is that of the residual too; `total` is x + residual."""
    return rms_norm_backward(grad_normed, total, weight, eps) + grad_total


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient of `rms_norm` by `x`, in the dtype of `x`, computed in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s, g = x.to(wide), grad.to(wide) * weight.to(wide)
    r = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    return (r * (g - s * r.square() * (g * s).mean(-1, keepdim=True))).to(x.dtype)


def add_rms_norm_quantized(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, row_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` and then `quantize_rows` of the normed rows, without rounding in between."""
    total = x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    return *quantize_rows(rms_norm(total.to(wide), weight.to(wide), eps), row_format), total
