"""Norm and mean of each text's rows in plain torch, in float32 at least."""

import torch
from torch import Tensor

from gen_fast.ops.norm.reference import rms_norm, rms_norm_backward


def pool(
    hidden: Tensor, offsets: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> Tensor:
    """Weighted mean [B, h] of the normed rows of each text. See `op.pool`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = rms_norm(hidden.to(dtype), norm_weight.to(dtype), eps)
    text, shares = _shares(hidden, offsets, row_weights)
    counts = offsets.diff()
    mean = torch.zeros(len(counts), hidden.shape[1], dtype=dtype, device=hidden.device)
    # The mean of no rows is NaN, as 0/0 is.
    mean = mean + torch.where(counts > 0, 0.0, torch.nan)[:, None]
    return mean.index_add(0, text, rows * shares[:, None])


def pool_backward(
    hidden: Tensor,
    grad: Tensor,
    offsets: Tensor,
    norm_weight: Tensor,
    eps: float,
    row_weights: Tensor | None,
) -> Tensor:
    """Gradient [R, h] of `hidden`."""
    text, shares = _shares(hidden, offsets, row_weights)
    return rms_norm_backward(grad[text] * shares[:, None], hidden, norm_weight, eps)


def _shares(hidden: Tensor, offsets: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The text of each row [R], and its weight within that text [R]."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counts = offsets.diff()
    text = torch.repeat_interleave(
        torch.arange(len(counts), device=hidden.device), counts, output_size=hidden.shape[0]
    )
    return text, (1.0 / counts.to(dtype))[text] if row_weights is None else row_weights.to(dtype)
