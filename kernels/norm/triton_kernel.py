"""Residual add + RMSNorm in Triton: a row a program, kept in registers between sum and scale."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.layout import adjacent
from gen_fast.ops.qlinear.triton_kernel import (
    empty_quantized,
    row_columns,
    row_constants,
    store_quantized,
)


@triton.jit
def _add_and_scale(
    x, residual, weight, total, size, x_stride, residual_stride, eps,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of one row, stored, and its norm in float32; also the row's columns and mask."""
    row = tl.program_id(0).to(tl.int64)
    columns, inside = row_columns(size, PARTS, BLOCK)
    added = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
    # As rounded: the norm is that of the stored stream.
    rounded = added.to(total.dtype.element_ty)
    tl.store(total + row * size + columns, rounded, mask=inside)
    stream = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(stream * stream) / size + eps)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    return stream * scale * weights, row * size + columns, inside


@triton.jit
def _norm_forward(
    x, residual, weight, total, out, size, x_stride, residual_stride, eps, BLOCK: tl.constexpr
):  # fmt: skip
    normed, at, inside = _add_and_scale(
        x, residual, weight, total, size, x_stride, residual_stride, eps, 1, BLOCK
    )
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_quantized(
    x, residual, weight, total, out, scales, size, x_stride, residual_stride, eps,
    LARGEST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    normed, at, inside = _add_and_scale(
        x, residual, weight, total, size, x_stride, residual_stride, eps, PARTS, BLOCK
    )
    scale_out = scales + tl.program_id(0)
    store_quantized(normed, out + at, scale_out, inside, LARGEST, PARTS, BLOCK)


@triton.jit
def _norm_backward(
    grad_normed, grad_total, total, weight, out, size, grad_normed_stride, grad_total_stride,
    total_stride, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < size
    stream = tl.load(total + row * total_stride + columns, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad_normed + row * grad_normed_stride + columns, mask=inside, other=0.0)
    upstream = upstream.to(tl.float32) * tl.load(weight + columns, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(stream * stream, 0) / size + eps)
    # d(s·r·w) with r = (mean(s²) + eps)^(-1/2): r·(g·w) - s·r³·mean(g·w·s)
    shared = scale * scale * tl.sum(upstream * stream, 0) / size
    result = scale * (upstream - stream * shared)
    result += tl.load(grad_total + row * grad_total_stride + columns, mask=inside, other=0.0)
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """See `op.add_rms_norm`."""
    x, residual, weight = adjacent(x), adjacent(residual), weight.contiguous()
    rows, size = x.shape
    total = residual if inplace and residual.is_contiguous() else torch.empty_like(x)
    out = x.new_empty(rows, size)
    strides = x.stride(0), residual.stride(0)
    gpu.launch_rows(
        _norm_forward, (rows, size), x, residual, weight, total, out, size, *strides, eps
    )
    return out, total


def add_rms_norm_quantized(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, row_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See `op.add_rms_norm_quantized`."""
    x, residual, weight = adjacent(x), adjacent(residual), weight.contiguous()
    rows, size = x.shape
    total = x.new_empty(rows, size)
    out, scales = empty_quantized(x, size, row_format)
    strides, constants = (x.stride(0), residual.stride(0)), row_constants(size, row_format)
    inputs = x, residual, weight, total, out, scales, size, *strides, eps
    gpu.launch_rows(_norm_quantized, (rows, size), *inputs, **constants)
    return out, scales, total


def add_rms_norm_backward(
    grad_normed: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """Gradient [T, h] of x and of the residual."""
    grad_normed, grad_total, total = map(adjacent, (grad_normed, grad_total, total))
    rows, size = total.shape
    out = total.new_empty(rows, size)
    strides = grad_normed.stride(0), grad_total.stride(0), total.stride(0)
    inputs = grad_normed, grad_total, total, weight.contiguous(), out, size, *strides, eps
    gpu.launch_rows(_norm_backward, (rows, size), *inputs)
    return out
