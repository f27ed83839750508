"""Packed attention, ragged and short texts, with and without a shared prefix."""

import pytest
import torch
from conftest import DTYPES, HEAD_DIM, HEADS, KV_HEADS

from gen_fast.ops.attention import OP, attention
from gen_fast.ops.attention.reference import attention as reference

CASES = {
    "short": ([22] * 93, 0),
    "ragged": ([20, 33, 60, 75, 90, 120, 150, 200, 240, 300, 340, 420], 0),
    "long": ([512] * 4, 0),
    "short behind 1,000": ([22] * 93, 1000),
}

# The reference loops over texts: it is an oracle, and nothing that anyone would run.
IMPLEMENTATIONS = [name for name in OP.implementations("cpu") if name != "reference"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def bench_attention(measure, case, dtype, impl):
    lengths, n_prefix = CASES[case]
    total = sum(lengths)
    fused = torch.randn(total, HEADS + 2 * KV_HEADS, HEAD_DIM).to(DTYPES[dtype])
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    prefix = torch.randn(2, n_prefix, KV_HEADS, HEAD_DIM).to(DTYPES[dtype])
    pairs = sum(n * (n + 1) // 2 + n * n_prefix for n in lengths)

    def with_prefix(function, **options):
        def run(q, k, v, offsets, prefix):
            shared = prefix.unbind() if n_prefix else (None, None)
            return function(q, k, v, offsets, offsets, *shared, **options)

        return run

    measure(
        with_prefix(attention, impl=impl),
        with_prefix(reference),
        (q, k, v, offsets, prefix),
        moved_bytes=(2 * q.numel() + 2 * k.numel() + prefix.numel()) * q.element_size(),
        flops=4 * HEADS * HEAD_DIM * pairs,
    )
