"""Norm and mean of each text's rows in plain torch, in float32 at least."""

import torch
from torch import Tensor

from gen_fast.ops.norm.reference import rms_norm


def pool(
    hidden: Tensor, cu_seqlens: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> Tensor:
    """Weighted mean [B, h] of the normed rows of each text. See `op.pool`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = rms_norm(hidden.to(dtype), norm_weight.to(dtype), eps)
    counts = cu_seqlens.diff()
    texts = torch.arange(len(counts), device=hidden.device)
    text = torch.repeat_interleave(texts, counts, output_size=hidden.shape[0])
    shares = (1.0 / counts.to(dtype))[text] if row_weights is None else row_weights.to(dtype)
    mean = torch.zeros(len(counts), hidden.shape[1], dtype=dtype, device=hidden.device)
    # The mean of no rows is NaN, as 0/0 is.
    mean = mean + torch.where(counts > 0, 0.0, torch.nan)[:, None]
    return mean.index_add(0, text, rows * shares[:, None])
