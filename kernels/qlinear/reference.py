"""Symmetric quantisation of rows, in plain torch."""

import torch
from torch import Tensor

# Storage dtype and largest magnitude of each format. fp8 is e4m3 (Micikevicius et al.,
# arXiv 2209.05433, table 1).
FORMATS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def quantize_rows(x: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    """Return (q [T, f], scale [T] float32) with x ≈ q · scale. See `op.quantize_rows`."""
    dtype, largest = FORMATS[row_format]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.abs().amax(-1, keepdim=True) / largest if x.shape[-1] else wide.sum(-1, True)
    # A row of zeros has scale 0 and quantises to zeros.
    scaled = wide / scale.where(scale > 0, 1.0)
    return (scaled.round() if row_format == "int8" else scaled).to(dtype), scale.squeeze(-1).float()


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """Undo `quantize_rows`: float32 [T, f]."""
    return q.float() * scale.unsqueeze(-1)
