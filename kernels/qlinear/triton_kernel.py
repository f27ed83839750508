"""Row quantisation in Triton, alone and as the epilogue of other kernels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.layout import adjacent

from .reference import FORMATS, ROTATED, rotated_together


@triton.jit
def row_columns(size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of a row, and which of them it has: [BLOCK], for `store_quantized` to rotate
    [PARTS, BLOCK] of the row as a matrix [PARTS, size / PARTS].
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < size // PARTS
    if PARTS > 1:
        starts = tl.arange(0, PARTS) * (size // PARTS)
        columns, inside = starts[:, None] + columns[None, :], inside[None, :]
    return columns, inside


@triton.jit
def rotated(row, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """`rotate_rows` of a row [PARTS, BLOCK], PARTS a power of two up to 64.

    A step takes sums and differences of neighbours, and puts the sums before the differences: so
    the next bit of a row's number is the last one, and after all steps the order is the old one.
    """
    row *= PARTS**-0.5
    for step in tl.static_range(6):
        if 1 << step < PARTS:
            pairs = tl.permute(tl.reshape(row, (PARTS // 2, 2, BLOCK)), (0, 2, 1))
            a, b = tl.split(pairs)
            row = tl.reshape(tl.permute(tl.join(a + b, a - b), (2, 0, 1)), (PARTS, BLOCK))
    return row


@triton.jit
def store_quantized(
    row, out, scale_out, inside, LARGEST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Quantise one row (float32 at `row_columns`, 0 outside) and store it and its scale.

    The scale of a row with NaN is NaN, which tl.max drops: the largest magnitude is found as bits,
    among which those of NaN are above those of infinity.
    """
    if PARTS > 1:
        row = rotated(row, PARTS, BLOCK)
    bits = row.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(bits).to(tl.float32, bitcast=True) / LARGEST
    scaled = row / tl.where(scale > 0, scale, 1.0)
    if out.dtype.element_ty == tl.int8:
        # Adding 1.5·2²³ leaves no fraction bits: rounds to nearest even, as torch.round does.
        scaled = (scaled + 12582912.0) - 12582912.0
    tl.store(out, scaled.to(out.dtype.element_ty), mask=inside)
    tl.store(scale_out, scale)


@triton.jit
def _qlinear_quantize(
    x, out, scales, size, stride, LARGEST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns, inside = row_columns(size, PARTS, BLOCK)
    values = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    at = out + row * size + columns
    store_quantized(values, at, scales + row, inside, LARGEST, PARTS, BLOCK)


def empty_quantized(like: Tensor, size: int, row_format: str) -> tuple[Tensor, Tensor]:
    """Where the rows [T, size] and scales [T] go; T and the device are those of `like`."""
    dtype, _ = FORMATS[row_format]
    rows = len(like)
    return like.new_empty(rows, size, dtype=dtype), like.new_empty(rows, dtype=torch.float32)


def row_constants(size: int, row_format: str) -> dict[str, Any]:
    """The constants of a kernel that ends in `store_quantized`, for rows of `size`."""
    _, largest = FORMATS[row_format]
    return {"LARGEST": largest, "PARTS": rotated_together(size) if row_format == ROTATED else 1}


def quantize_rows(x: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    """See `op.quantize_rows`."""
    x = adjacent(x)
    out, scales = empty_quantized(x, x.shape[1], row_format)
    rows, size = x.shape
    inputs, constants = (x, out, scales, size, x.stride(0)), row_constants(size, row_format)
    gpu.launch_rows(_qlinear_quantize, (rows, size), *inputs, **constants)
    return out, scales
