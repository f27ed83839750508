"""SwiGLU in Triton: one pass over gate and up, forward, backward and with quantised rows."""

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

BLOCK = 1024


@triton.jit
def _swiglu_forward(gate_up, out, size, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < size
    gate = tl.load(gate_up + row * stride + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + columns, mask=inside).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(grad, gate_up, out, size, grad_stride, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < size
    upstream = tl.load(grad + row * grad_stride + columns, mask=inside).to(tl.float32)
    gate = tl.load(gate_up + row * stride + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + columns, mask=inside).to(tl.float32)
    share = tl.sigmoid(gate)
    # silu'(g) = s·(1 + g·(1 - s)) with s = sigmoid(g)
    dgate = upstream * up * share * (1 + gate * (1 - share))
    dup = upstream * gate * share
    start = out + row * 2 * size + columns
    tl.store(start, dgate.to(out.dtype.element_ty), mask=inside)
    tl.store(start + size, dup.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_quantized(
    gate_up, out, scales, size, stride,
    LARGEST: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns, inside = row_columns(size, PARTS, BLOCK)
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    at = out + row * size + columns
    store_quantized(result, at, scales + row, inside, LARGEST, PARTS, BLOCK)


def swiglu(gate_up: Tensor) -> Tensor:
    """See `op.swiglu`."""
    gate_up = adjacent(gate_up)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    if out.numel():
        grid = (rows, triton.cdiv(size, BLOCK))
        gpu.launch(_swiglu_forward, grid, gate_up, out, size, gate_up.stride(0), BLOCK=BLOCK)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient [T, 2f] of `gate_up`."""
    grad, gate_up = adjacent(grad), adjacent(gate_up)
    rows, size = grad.shape
    out = gate_up.new_empty(gate_up.shape)
    if out.numel():
        strides = grad.stride(0), gate_up.stride(0)
        grid = (rows, triton.cdiv(size, BLOCK))
        gpu.launch(_swiglu_backward, grid, grad, gate_up, out, size, *strides, BLOCK=BLOCK)
    return out


def swiglu_quantized(gate_up: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    """See `op.swiglu_quantized`."""
    gate_up = adjacent(gate_up)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out, scales = empty_quantized(gate_up, size, row_format)
    inputs = gate_up, out, scales, size, gate_up.stride(0)
    constants = row_constants(size, row_format)
    gpu.launch_rows(_swiglu_quantized, (rows, size), *inputs, **constants)
    return out, scales
