"""Per-head RMSNorm and rotation in Triton: all heads of a row in one program.

A row's cosines and sines are read once and serve every head.
"""

import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.layout import dense_rows


@triton.jit
def _halves(x, at, inside, HALF: tl.constexpr):
    """The first and the second half of the heads at `at` [HEADS, BLOCK], float32."""
    first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _places(heads, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Where the first halves of a row's heads lie, and which places are real: [HEADS, BLOCK]."""
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    return head * (2 * HALF) + column, (head < heads) & (column < HALF)


@triton.jit
def _angle(table, row, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines or sines of a row's position: [1, BLOCK]."""
    column = tl.arange(0, BLOCK)
    return tl.load(table + row * HALF + column, mask=column < HALF, other=0.0)[None, :]


@triton.jit
def _rope_forward(
    x, out, cos, sin, norm, stride, out_stride, heads, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, inside = _places(heads, HALF, HEADS, BLOCK)
    first, second = _halves(x + row * stride, at, inside, HALF)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, 1)  # [HEADS]
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first_weight, second_weight = _halves(norm, at, inside, HALF)
        first, second = first * scale * first_weight, second * scale * second_weight
    c, s = _angle(cos, row, HALF, BLOCK), _angle(sin, row, HALF, BLOCK)
    target = out + row * out_stride + at
    tl.store(target, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rope_backward(
    grad, x, out, cos, sin, norm, grad_stride, stride, heads, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, inside = _places(heads, HALF, HEADS, BLOCK)
    first, second = _halves(grad + row * grad_stride, at, inside, HALF)
    c, s = _angle(cos, row, HALF, BLOCK), _angle(sin, row, HALF, BLOCK)
    # The transpose of a rotation is the rotation back.
    dfirst, dsecond = first * c + second * s, second * c - first * s
    if HAS_NORM:
        first, second = _halves(x + row * stride, at, inside, HALF)
        first_weight, second_weight = _halves(norm, at, inside, HALF)
        dfirst, dsecond = dfirst * first_weight, dsecond * second_weight
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)  # [HEADS]
        shared = scale * scale * tl.sum(dfirst * first + dsecond * second, 1) / (2 * HALF)
        dfirst = scale[:, None] * (dfirst - first * shared[:, None])
        dsecond = scale[:, None] * (dsecond - second * shared[:, None])
    target = out + row * heads * (2 * HALF) + at
    tl.store(target, dfirst.to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF, dsecond.to(out.dtype.element_ty), mask=inside)


def _constants(heads: int, size: int, has_norm: bool) -> dict[str, int | bool]:
    padded, block = gpu.power_of_two(heads), gpu.power_of_two(size // 2)
    return {
        "HALF": size // 2,
        "HEADS": padded,
        "BLOCK": block,
        "HAS_NORM": has_norm,
        "num_warps": gpu.row_warps(2 * padded * block),
    }


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float, *, inplace: bool = False
) -> Tensor:
    """See `op.rope`."""
    x = dense_rows(x)
    rows, heads, size = x.shape
    out = x if inplace else x.new_empty(x.shape)
    if x.numel():
        gpu.launch(
            _rope_forward,
            (rows,),
            x,
            out,
            cos.float().contiguous(),
            sin.float().contiguous(),
            None if norm is None else norm.contiguous(),
            x.stride(0),
            out.stride(0),
            heads,
            eps,
            **_constants(heads, size, norm is not None),
        )
    return out


def rope_backward(
    grad: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float
) -> Tensor:
    """Gradient [T, N, D] of `x`, which is needed only if there is a norm."""
    grad = dense_rows(grad)
    x = None if x is None else dense_rows(x)
    rows, heads, size = grad.shape
    out = grad.new_empty(grad.shape)
    if grad.numel():
        gpu.launch(
            _rope_backward,
            (rows,),
            grad,
            x,
            out,
            cos.float().contiguous(),
            sin.float().contiguous(),
            None if norm is None else norm.contiguous(),
            grad.stride(0),
            0 if x is None else x.stride(0),
            heads,
            eps,
            **_constants(heads, size, norm is not None),
        )
    return out
