"""Choice of implementation for norm."""

import torch
from torch import Tensor

from gen_fast.ops import Op, native

from . import reference

OP = Op("norm")
OP.register("reference")(reference.add_rms_norm)


@OP.register("cpu", **native.ON_CPU)
def _cpu(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight, total = x.contiguous(), weight.contiguous(), residual.contiguous()
    out = torch.empty_like(total)
    native.module().add_rms_norm(
        total.dtype == torch.bfloat16,
        *map(native.address, (x, total, weight, out)),
        *(out.numel() // max(1, out.shape[-1]), out.shape[-1], eps),
    )
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension of `x` [T, h] with `weight` [h]. Same dtype as `x`.

    Source: Zhang & Sennrich, arXiv 1910.07467, eq. 4.
    """
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum for the next block.

    x, residual [T, h], weight [h], one dtype. Returns (rms_norm(x + residual), x + residual);
    without gradients the second may be `residual` itself, updated in place.
    """
    result: tuple[Tensor, Tensor] = OP.choose(impl, x, residual)(x, residual, weight, eps)
    return result
