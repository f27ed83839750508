"""Packed attention, ragged and short texts, with and without a shared prefix."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.attention as attention_kernels
from conftest import DEVICE, DTYPES, MODES, SIZES, random
from torch.nn.attention.varlen import varlen_attn

from gen_fast.ops import native
from gen_fast.ops.attention import OP, AttentionOptions, attention
from gen_fast.ops.attention.reference import attention as reference
from gen_fast.testing import instructions_up_to

CASES = {
    "cpu": {
        "short": ([22] * 1500, 0),  # bound by memory, so it must exceed the caches
        "ragged": ([20, 33, 60, 75, 90, 120, 150, 200, 240, 300, 340, 420], 0),
        "long": ([512] * 4, 0),
        "short behind 1,000": ([22] * 93, 1000),
    },
    "cuda": {
        "256-276": ([256 + i % 21 for i in range(240)], 0),
        "256-276 behind 100": ([256 + i % 21 for i in range(240)], 100),
        "short": ([32] * 512, 0),
        "ragged": ([20, 33, 60, 75, 90, 120, 150, 200, 240, 300, 340, 420] * 8, 0),
        "long": ([2048] * 8, 0),
        "short behind 1,000": ([32] * 512, 1000),
        "8 tokens behind 1,000": ([8] * 2048, 1000),  # the prefix goes first
    },
}[DEVICE]
# The reference loops over texts, whose lengths it asks for: on a GPU it would time the host. Nor is
# it measured under torch.compile, which leaves that loop to Python (three graphs of eight calls).
IMPLEMENTATIONS = [
    name for name in OP.implementations(DEVICE) if DEVICE == "cpu" or name != "reference"
]
# The C++ op without tiles, where the processor has AMX.
AVX512 = "cpu-avx512"
if DEVICE == "cpu" and native.missing() is None and native.isa() == native.Isa.AMX:
    IMPLEMENTATIONS.append(AVX512)
# FlashAttention 2 as torch has it, below and behind its public function, 3 where torch can load it,
# and FlexAttention masked by text. None knows a prefix.
FLASH = ["flash-attention", "varlen", "varlen-fa3"]
PEERS = [*FLASH, "flex-attention"] if DEVICE == "cuda" else []
# It takes long to compile: measured where it says most.
FLEX = (next(iter(SIZES.values())), "ragged")


def flash_attention(q, k, v, offsets, lengths):
    longest = max(lengths)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, True, False
    )[0]


@contextmanager
def flash_attention_3():
    """Makes torch's varlen_attn run FlashAttention 3; skips where torch or its package lacks it."""
    if "FA3" not in attention_kernels.list_flash_attention_impls():
        pytest.skip("this torch has no FlashAttention 3")
    try:
        attention_kernels.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"FlashAttention 3 does not load: {error}")
    try:
        yield
    finally:
        attention_kernels.restore_flash_attention_impl()


def varlen_attention(q, k, v, offsets, lengths):
    longest = max(lengths)
    return varlen_attn(
        q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0), enable_gqa=True
    )


def flex_attention(offsets, total):
    from torch.nn.attention import flex_attention as flex

    text = torch.searchsorted(offsets, torch.arange(total, device=DEVICE), right=True)

    def seen(_batch, _head, query, key):
        return (key <= query) & (text[query] == text[key])

    mask = flex.create_block_mask(seen, None, None, total, total, device=DEVICE)
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def run(q, k, v, *_):
        heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        return compiled(*heads_first, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return run


@pytest.mark.parametrize("provider", IMPLEMENTATIONS + PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cpu" else ["bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def bench_attention(measure, size, case, dtype, mode, provider):
    trained = mode != "forward"
    lengths, n_prefix = CASES[case]
    if provider in PEERS and n_prefix:
        pytest.skip("has no shared prefix")
    if provider == "flex-attention" and (size, case) != FLEX:
        pytest.skip("measured for one size and case")
    impl = "cpu" if provider == AVX512 else provider
    if trained and impl not in [*OP.backward.implementations(DEVICE), *PEERS]:
        pytest.skip("has no backward pass")
    n_q, n_kv = size.heads, size.kv_heads
    fused = random(sum(lengths), n_q + 2 * n_kv, size.head_dim, dtype=dtype)
    q, k, v = (x.requires_grad_(trained) for x in fused.split([n_q, n_kv, n_kv], dim=1))
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    prefix = random(2, n_prefix, n_kv, size.head_dim, dtype=dtype)
    pairs = sum(n * (n + 1) // 2 + n * n_prefix for n in lengths)

    def options(offsets, prefix):
        shared = prefix.unbind() if n_prefix else (None, None)
        return AttentionOptions(offsets, offsets, *shared)

    def run(q, k, v, offsets, prefix):
        if provider in FLASH:
            flash = flash_attention if provider == "flash-attention" else varlen_attention
            return flash(q, k, v, offsets, lengths)
        return attention(q, k, v, options(offsets, prefix), impl=impl)

    if provider == "flex-attention":
        run = flex_attention(offsets, sum(lengths))  # its mask is made once a batch

    def plain(q, k, v, offsets, prefix):
        return reference(q, k, v, options(offsets, prefix))[0]

    around = nullcontext()
    if provider == "varlen-fa3":
        around = flash_attention_3()
    elif provider == AVX512:
        around = instructions_up_to(native.Isa.AVX512)
    moved = (2 * q.numel() + 2 * k.numel() + prefix.numel()) * q.element_size()
    with around:
        measure(
            run,
            plain,
            (q, k, v, offsets, prefix),
            moved_bytes=moved * (3 if trained else 1),
            # Two products forward, five backward.
            flops=(14 if trained else 4) * n_q * size.head_dim * pairs,
        )
