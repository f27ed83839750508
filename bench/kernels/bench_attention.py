"""Packed attention, ragged and short texts, with and without a shared prefix."""

import pytest
import torch
from conftest import DEVICE, DTYPES, MODES, SIZES, random

from gen_fast.ops.attention import OP, attention
from gen_fast.ops.attention.reference import attention as reference

CASES = {
    "cpu": {
        "short": ([22] * 93, 0),
        "ragged": ([20, 33, 60, 75, 90, 120, 150, 200, 240, 300, 340, 420], 0),
        "long": ([512] * 4, 0),
        "short behind 1,000": ([22] * 93, 1000),
    },
    "cuda": {
        "short": ([32] * 512, 0),
        "ragged": ([20, 33, 60, 75, 90, 120, 150, 200, 240, 300, 340, 420] * 8, 0),
        "long": ([2048] * 8, 0),
        "short behind 1,000": ([32] * 512, 1000),
    },
}[DEVICE]


# The reference loops over texts: it is an oracle, and nothing that anyone would run.
IMPLEMENTATIONS = [name for name in OP.implementations(DEVICE) if name != "reference"]


@pytest.mark.parametrize("provider", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cpu" else ["bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def bench_attention(measure, size, case, dtype, mode, provider):
    trained = mode != "forward"
    if trained and provider not in OP.backward.implementations(DEVICE):
        pytest.skip("has no backward pass")
    lengths, n_prefix = CASES[case]
    n_q, n_kv = size.heads, size.kv_heads
    fused = random(sum(lengths), n_q + 2 * n_kv, size.head_dim, dtype=dtype)
    q, k, v = (x.requires_grad_(trained) for x in fused.split([n_q, n_kv, n_kv], dim=1))
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    prefix = random(2, n_prefix, n_kv, size.head_dim, dtype=dtype)
    pairs = sum(n * (n + 1) // 2 + n * n_prefix for n in lengths)

    def run(q, k, v, offsets, prefix):
        shared = prefix.unbind() if n_prefix else (None, None)
        return attention(q, k, v, offsets, offsets, *shared, impl=provider)

    def plain(q, k, v, offsets, prefix):
        shared = prefix.unbind() if n_prefix else (None, None)
        return reference(q, k, v, offsets, offsets, *shared)[0]

    moved = (2 * q.numel() + 2 * k.numel() + prefix.numel()) * q.element_size()
    measure(
        run,
        plain,
        (q, k, v, offsets, prefix),
        moved_bytes=moved * (3 if trained else 1),
        # Two products forward, five backward.
        flops=(14 if trained else 4) * n_q * size.head_dim * pairs,
    )
