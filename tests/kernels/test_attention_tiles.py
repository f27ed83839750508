"""Which text a tile of the Triton kernels is of, how large it is; the prefix that goes first."""

import random
from unittest import mock

import pytest
import torch
from test_attention import MASKED, TRIMMED, check, check_backward, inputs, moved, offsets

from gen_fast import ops
from gen_fast.model.batch import PackedBatch
from gen_fast.model.weights import load_backbone
from gen_fast.ops import gpu
from gen_fast.ops.attention import (
    AttentionOptions,
    attention,
    triton_backward,
    triton_kernel,
    triton_prefix,
    triton_tiles,
)
from gen_fast.testing import no_host_sync

on_each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu", marks=pytest.mark.skipif(not gpu.interpreted(), reason="Triton compiles here")
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


def owners(counts, rows, group, block):
    """The text of each tile, one tile after the other."""
    texts, before = [], 0
    for text, count in enumerate(counts):
        end = rows if text == len(counts) - 1 else before + count
        first, following = before * group // block + text, end * group // block + text + 1
        assert first == len(texts)
        assert (following - first) * block >= (end - before) * group
        texts += [text] * (following - first)
        before += count
    return texts


@on_each_device
def test_every_tile_is_of_the_text_that_owns_it(device):
    draw = random.Random(0)
    for _ in range(20):
        longest = draw.choice([1, 3, 40, 700])
        counts = [draw.randint(0, longest) for _ in range(draw.randint(1, 12))]
        rows = sum(counts) + draw.choice([0, 0, 1, 50])
        group, block = draw.choice([1, 2, 3, 7, 16]), draw.choice([16, 32, 64, 128])
        starts = offsets(counts).to(device)
        options = AttentionOptions(starts, starts)
        texts = triton_tiles.tile_texts(options, starts, rows, group, block)
        assert texts.tolist() == owners(counts, rows, group, block)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched, in order."""
    names = []

    def launch(kernel, grid, *arguments, **constants):
        names.append(kernel.__name__.strip("_"))
        kernel[grid](*arguments, **constants)

    monkeypatch.setattr(gpu, "launch", launch)
    return names


@on_each_device
def test_layers_and_their_gradients_share_the_table(device, launched):
    q, k, v, *starts = (
        moved(x, device) for x in inputs([5, 3], [9, 3], 0, 4, 2, 64, torch.float32)[:5]
    )
    prefixes = torch.randn(3, 2, 4, 2, 64, device=device)
    options = AttentionOptions(*starts)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for prefix in prefixes:
        out = attention(*leaves, options.with_prefix(*prefix), impl="triton")
        out.sum().backward()
    # Tiles of queries, forward and backward, and of keys.
    assert launched.count("tile_texts") <= 3
    before = launched.count("tile_texts")
    dropped = AttentionOptions(*starts, dropout=0.3)
    for layer in range(3):
        attention(*leaves, dropped.with_layer(layer), impl="triton").sum().backward()
    assert launched.count("tile_texts") - before <= 3
    assert launched.count("attention_forward") == 6


@on_each_device
@pytest.mark.parametrize("recompute", [False, True])
def test_a_pass_builds_its_tables_once(recompute, tiny_model, device, launched, monkeypatch):
    monkeypatch.setattr(ops, "FORCED", "triton,reference")
    backbone = load_backbone(tiny_model, device=device)
    batch = PackedBatch.pack([[3, 4, 5], [6, 384]], needed=[1, 2], device=device)
    special = torch.zeros(1, backbone.config.hidden_size, device=device, requires_grad=True)
    backbone.forward(batch, special=special, recompute=recompute).sum().backward()
    assert launched.count("attention_forward") >= backbone.config.num_layers == 3
    # However many layers: for all rows and for those that are needed, tiles of queries forward and
    # backward, which differ in size, and tiles of keys.
    assert launched.count("tile_texts") == 6


def test_the_table_needs_no_host_sync(monkeypatch):
    """Launches are left out: the interpreter, which makes them on a CPU, reads values."""
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)
    q, k, v, starts, _, *prefix = inputs([70] * 30, [70] * 30, 100, 4, 2, 64, torch.float32)
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2])
    for first in (False, True):
        monkeypatch.setattr(triton_prefix, "prefix_first", lambda *arguments, first=first: first)
        with no_host_sync():
            options = AttentionOptions(starts, starts, *prefix)
            triton_kernel.attention(q, k, v, options)
            triton_backward.attention_backward(q, q, k, v, out, lse, options)


@on_each_device
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.bfloat16, {}), (torch.bfloat16, MASKED["gem"]), (torch.float16, {"window": 9})],
)
def test_short_and_long_tiles_are_as_exact(dtype, options, long, device, monkeypatch):
    monkeypatch.setattr(triton_tiles, "SHORT", 0 if long else 1 << 30)
    counts = [1, 40, 5, 70, 12]
    arguments = inputs(counts, counts, 37, 6, 2, 64, dtype)
    check(arguments, device, "triton", **options)
    check_backward(arguments, device, "triton", **options)


def test_tiles_follow_the_mean_length(monkeypatch):
    monkeypatch.setattr(gpu, "architecture", lambda device: 90)
    q = torch.empty(0, 4, 128, dtype=torch.bfloat16)

    def block_q(rows, texts):
        tiles = triton_tiles.pinned(
            q, triton_kernel._TILES, triton_kernel._TILES_FLOAT32, rows, texts
        )
        return tiles[0].blocks["BLOCK_Q"]

    assert block_q(rows=60, texts=1) == block_q(rows=255 * 50, texts=50) == 64
    assert block_q(rows=256, texts=1) == block_q(rows=9000, texts=9) == 128


@pytest.mark.parametrize(
    ("tables", "owned"),
    [
        ((triton_kernel._TILES, triton_kernel._TILES_DROPOUT), "BLOCK_Q"),
        ((triton_backward._QUERY_TILES,), "BLOCK_Q"),
        ((triton_backward._KEY_TILES, triton_backward._KEY_TILES_DROPOUT), "BLOCK_K"),
    ],
)
def test_tiles_that_are_measured_together_share_a_table(tables, owned):
    for table in tables:
        assert set(table) == {80, 86, 90}
        for by_size in table.values():
            for tiles in by_size.values():
                for same in (tiles.short, tiles.long):
                    assert len({tile.blocks[owned] for tile in same}) == 1


PREFIX_FIRST = {
    "causal": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "bidirectional": (torch.float32, {"mask": "bidirectional"}),
}


@on_each_device
@pytest.mark.parametrize("name", PREFIX_FIRST)
def test_the_prefix_may_go_first(name, device, monkeypatch):
    """Texts without queries among them; results in between are in the dtype of q."""
    monkeypatch.setattr(triton_prefix, "prefix_first", lambda *arguments: True)
    dtype, options = PREFIX_FIRST[name]
    arguments = inputs(*TRIMMED, 37, 6, 2, 64, dtype)
    check(arguments, device, "triton", **options)
    check_backward(arguments, device, "triton", **options)


@on_each_device
def test_both_ways_of_the_prefix_agree(device, monkeypatch, launched):
    """Rows of padding too."""
    counts, padding = [3, 70, 1], 9
    arguments = inputs([*counts, padding], [*counts, padding], 70, 4, 2, 64, torch.float32)
    q, k, v, starts, _, *prefix = (moved(x, device) for x in arguments)
    starts = starts[:-1].contiguous()
    results = []
    for first in (False, True):
        monkeypatch.setattr(triton_prefix, "prefix_first", lambda *arguments, first=first: first)
        options = AttentionOptions(starts, starts, *prefix)
        out, lse = triton_kernel.attention(q, k, v, options)
        dq, dk, dv = triton_backward.attention_backward(q, q, k, v, out, lse, options)
        results.append((out, lse, dq, dk, dv))
    for together, apart in zip(*results, strict=True):
        torch.testing.assert_close(apart, together, atol=3e-5, rtol=3e-5)
        assert not apart[sum(counts) :].any()
    assert launched.count("attention_forward") == launched.count("attention_queries") == 3


@pytest.mark.parametrize(
    ("texts", "each", "n_prefix", "options", "first"),
    [
        (2048, 8, 1000, {}, True),
        (2048, 8, 1000, {"mask": "bidirectional"}, True),
        (2048, 32, 1000, {}, False),  # 64 rows of two heads: full tiles
        (1, 1, 1000, {}, False),  # a token of one text
        (64, 8, 10, {}, False),  # a launch takes longer
        (2048, 8, 0, {}, False),
        (2048, 8, 1000, {"window": 4096}, False),
        (2048, 8, 1000, {"mask": "gem"}, False),
    ],
)
def test_the_prefix_goes_first_where_that_saves_more_than_it_costs(
    texts, each, n_prefix, options, first
):
    q = torch.empty(texts * each, 16, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(texts * each, 8, 128, dtype=torch.bfloat16, device="meta")
    prefix = torch.empty(n_prefix, 8, 128, dtype=torch.bfloat16, device="meta")
    starts = torch.empty(texts + 1, dtype=torch.int32, device="meta")
    if options.get("mask") == "gem":
        options = options | {"blocks": torch.empty(texts, 2, dtype=torch.int32, device="meta")}
    options = AttentionOptions(starts, starts, prefix, prefix, **options)
    assert triton_prefix.prefix_first(q, k, options, 64) == first


def test_tiles_are_those_of_the_shared_memory():
    for own, tiles in ((80, 80), (86, 86), (87, 80), (89, 86), (90, 90), (100, 90), (120, 86)):
        with mock.patch.object(gpu, "architecture", lambda device, own=own: own):
            assert gpu.tile_architecture(torch.device("cpu")) == tiles
