"""Pooling in plain torch, in float32 at least whatever the backbone's dtype."""

import torch
from torch import Tensor

from gen_fast.ops.norm.reference import rms_norm


def pool(
    hidden: Tensor,
    offsets: Tensor,
    norm_weight: Tensor,
    eps: float,
    row_weights: Tensor | None = None,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: bool = False,
) -> Tensor:
    """Weighted mean of the normed rows of each segment, projected. See `op.pool`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    rows = rms_norm(hidden.to(dtype), norm_weight.to(dtype), eps)
    counts = offsets.diff()
    segment = torch.repeat_interleave(
        torch.arange(len(counts), device=hidden.device), counts, output_size=hidden.shape[0]
    )
    if row_weights is None:
        row_weights = (1.0 / counts.to(dtype))[segment]
    weighted = rows * row_weights.to(dtype).unsqueeze(-1)
    mean = torch.zeros(len(counts), hidden.shape[1], dtype=dtype, device=hidden.device)
    mean = mean.index_add(0, segment, weighted)
    if projection is not None:
        mean = torch.nn.functional.linear(
            mean, projection.to(dtype), None if bias is None else bias.to(dtype)
        )
    return torch.nn.functional.normalize(mean, dim=-1) if normalize else mean
