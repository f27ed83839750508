"""Row quantisation in Triton, alone and as the epilogue of other kernels."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.layout import adjacent

from .reference import FORMATS

LARGEST = {name: largest for name, (_, largest) in FORMATS.items()}


@triton.jit
def store_quantized(row, out, scale_out, inside, LARGEST: tl.constexpr):
    """Quantise one row (a block of float32, 0 outside) and store it and its scale.

    The scale of a row with NaN is NaN, which tl.max drops: the largest magnitude is found as bits,
    among which those of NaN are above those of infinity.
    """
    bits = row.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(bits, 0).to(tl.float32, bitcast=True) / LARGEST
    scaled = row / tl.where(scale > 0, scale, 1.0)
    if out.dtype.element_ty == tl.int8:
        # Adding 1.5·2²³ leaves no fraction bits: rounds to nearest even, as torch.round does.
        scaled = (scaled + 12582912.0) - 12582912.0
    tl.store(out, scaled.to(out.dtype.element_ty), mask=inside)
    tl.store(scale_out, scale)


@triton.jit
def _qlinear_quantize(x, out, scales, size, stride, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < size
    values = tl.load(x + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    store_quantized(values, out + row * size + columns, scales + row, inside, LARGEST)


def empty_quantized(like: Tensor, size: int, row_format: str) -> tuple[Tensor, Tensor]:
    """Where the rows [T, size] and scales [T] go; T and the device are those of `like`."""
    dtype, _ = FORMATS[row_format]
    rows = len(like)
    return like.new_empty(rows, size, dtype=dtype), like.new_empty(rows, dtype=torch.float32)


def quantize_rows(x: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    """See `op.quantize_rows`."""
    x = adjacent(x)
    out, scales = empty_quantized(x, x.shape[1], row_format)
    rows, size = x.shape
    inputs = x, out, scales, size, x.stride(0)
    gpu.launch_rows(_qlinear_quantize, (rows, size), *inputs, LARGEST=LARGEST[row_format])
    return out, scales
