"""Symmetric quantisation of rows, and their products, in plain torch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The format of rows that `rotate_rows` has been applied to.
ROTATED = "int8-rotated"
# Storage dtype and largest magnitude of each format. fp8 is e4m3 (Micikevicius et al.,
# arXiv 2209.05433, table 1).
FORMATS = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
    ROTATED: (torch.int8, 127.0),
}


def rotated_together(size: int) -> int:
    """How many values of a row of `size` a rotation mixes: the largest power of two, up to 64."""
    return math.gcd(size, 64)


def rotate_rows(x: Tensor) -> Tensor:
    """Each row of `x` [T, f], as a matrix [n, f / n], times a Hadamard matrix [n, n] over √n.

    n is the largest power of two up to 64 that divides f. The rotation is its own inverse, and
    spreads what stands out of a row over n values, so that fewer steps are lost to it.

    Source: Ashkboos et al., arXiv 2404.00456 (QuaRot), §3.
    """
    n = rotated_together(x.shape[-1])
    matrix = x.new_ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    rotated: Tensor = matrix / math.sqrt(n) @ x.unflatten(-1, (n, -1))
    return rotated.flatten(-2)


def quantize_rows(x: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    """Return (q [T, f], scale [T] float32) with x ≈ q · scale. See `op.quantize_rows`."""
    dtype, largest = FORMATS[row_format]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if row_format == ROTATED:
        wide = rotate_rows(wide)
    scale = wide.abs().amax(-1, keepdim=True) / largest if x.shape[-1] else wide.sum(-1, True)
    # A row of zeros has scale 0 and quantises to zeros.
    scaled = wide / scale.where(scale > 0, 1.0)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale.squeeze(-1).float()


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """Undo `quantize_rows`: float32 [T, f]."""
    return q.float() * scale.unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What a product's sums [T, out] become: scaled, biased, in the dtype of the result."""

    scale: Tensor
    """[T] float32: of the rows."""
    weight_scale: Tensor
    """[out] float32."""
    bias: Tensor | None
    """[out] in `dtype`."""
    dtype: torch.dtype


def scaled_product(q: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    """q [T, in] times weight [out, in], transposed: [T, out], computed in float32 at least."""
    dtype, bias = epilogue.dtype, epilogue.bias
    wide = torch.promote_types(dtype, torch.float32)
    sums = q.to(wide) @ weight.to(wide).T
    y = sums * epilogue.scale.unsqueeze(1) * epilogue.weight_scale
    return (y if bias is None else y + bias).to(dtype)
