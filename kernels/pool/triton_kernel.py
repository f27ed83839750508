"""Norm and mean of each text's rows in Triton: one program a text, its mean in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.layout import adjacent


@triton.jit
def _pool_forward(
    hidden, cu_seqlens, norm_weight, row_weights, out, size, stride, eps,
    HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    text = tl.program_id(0)
    # 64 bits, since rows times their stride may need them.
    begin = tl.load(cu_seqlens + text).to(tl.int64)
    end = tl.load(cu_seqlens + text + 1).to(tl.int64)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < size
    mean = tl.zeros([BLOCK], tl.float32)
    for row in range(begin, end):
        values = tl.load(hidden + row * stride + columns, mask=inside, other=0.0)
        values = values.to(tl.float32)
        share = 1.0 / (end - begin).to(tl.float32)
        if HAS_WEIGHTS:
            share = tl.load(row_weights + row).to(tl.float32)
        mean += values * (share * tl.rsqrt(tl.sum(values * values, 0) / size + eps))
    mean *= tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    # The mean of no rows is NaN, as 0/0 is.
    mean = tl.where(end > begin, mean, float("nan"))
    tl.store(out + text.to(tl.int64) * size + columns, mean, mask=inside)


def pool(
    hidden: Tensor, cu_seqlens: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> Tensor:
    """See `op.pool`."""
    hidden = adjacent(hidden)
    texts, size = cu_seqlens.shape[0] - 1, hidden.shape[1]
    out = hidden.new_empty(texts, size, dtype=torch.float32)
    gpu.launch_rows(
        _pool_forward,
        (texts, size),
        hidden,
        cu_seqlens.contiguous(),
        norm_weight.contiguous(),
        None if row_weights is None else row_weights.contiguous(),
        out,
        size,
        hidden.stride(0),
        eps,
        HAS_WEIGHTS=row_weights is not None,
        least_warps=4,
    )
    return out
