"""Packed attention with a shared prefix in Triton, forward (Dao, arXiv 2307.08691).

A tile holds BLOCK_Q rows of one text and one key/value head. A row is a (position, query head)
pair, the heads of the group side by side, so that short texts and few queries still fill a tile
and keys are read once a group. Which text a tile is of says a table: triton_tiles.py.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.dropout.triton_kernel import kept
from gen_fast.ops.gpu import Tile
from gen_fast.ops.layout import dense_rows

from .options import AttentionOptions
from .triton_prefix import Pass, passes
from .triton_tiles import (
    Tiles,
    padded,
    pinned,
    query_tile,
    tile,
    tile_count,
    tile_positions,
    tile_texts,
)

LOG2_E = math.log2(math.e)

# Triton's interpreter multiplies the bits of bfloat16 numbers (seen with 3.7.0): there, and only
# there, products are of float32.
_INTERPRETED = tl.constexpr(gpu.interpreted())


@triton.jit
def dot(a, b):
    """Matrix product accumulated in float32; float32 operands are not rounded to TF32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rows_to_store(text, n_texts, start, count, n_rows):
    """Rows from `start` on that the tiles of a text store: its `count`; the last one's all.

    Rows behind the last text are padding. The grid has tiles for all rows, and those that no text
    begins belong to the last one.
    """
    return tl.where(text == n_texts - 1, n_rows - start, count)


@triton.jit
def special_block(blocks, text, MASK: tl.constexpr):
    """The GEM mask's block of a text: own position of its first token, and that after its last."""
    first, after = 0, 0
    if MASK == "gem":
        first, after = tl.load(blocks + 2 * text), tl.load(blocks + 2 * text + 1)
    return first, after


@triton.jit
def dropout_place(layer, head, text_keys, text, DROPOUT: tl.constexpr):
    """What `kept_keys` draws from beside positions: layer_head of `head`, and the text's key."""
    layer_head, text_key = 0, 0
    if DROPOUT:
        layer_head, text_key = layer * 65536 + head, tl.load(text_keys + text)
    return layer_head, text_key


@triton.jit
def seen_keys(at, to, window, first, after, MASK: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Which keys `to` the queries `at` may attend, positions that broadcast; a prefix has negative.

    The shape is theirs together: queries by keys or keys by queries.
    """
    if MASK == "bidirectional":
        return (to <= at) | (to > at)
    seen = to <= at
    if HAS_WINDOW:
        seen = seen & (at - to < window)
    if MASK == "gem":
        seen = seen & ((at < after) | (to >= first))
        seen = seen & ((at < first) | (at >= after) | (to < first) | (to == at))
    return seen


@triton.jit
def kept_keys(
    seed, block, position, layer_head, text_key, first_kept, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Which weights [ROWS, BLOCK_K] of keys from `block` on are kept; block is a multiple of 4.

    position, layer_head [ROWS]: own position of the query, layer · 65536 + its head.
    """
    counters = block // 4 + tl.arange(0, BLOCK_K // 4)
    keep = kept(
        seed, counters[None, :], position[:, None], layer_head[:, None], text_key, first_kept
    )
    return tl.reshape(keep, (ROWS, BLOCK_K))


@triton.jit
def load_rows(
    x, row, stride, head, rows_end, D: tl.constexpr, D_PADDED: tl.constexpr
):  # fmt: skip
    """Tile [len(row), D_PADDED] of the heads `head` of rows `row`; 0 beyond rows_end and D."""
    column = tl.arange(0, D_PADDED)
    return tl.load(
        x + row.to(tl.int64)[:, None] * stride + (head * D)[:, None] + column[None, :],
        mask=(row < rows_end)[:, None] & (column < D)[None, :],
        other=0.0,
    )


@triton.jit
def _attend(
    acc, mass, peak, q, k, v, k_stride, v_stride, n_keys, begin, end, base, position, kv_head,
    scale, window, first, after, seed, layer_head, text_key, first_kept,
    MASKED: tl.constexpr, MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, DROPOUT: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query tile over keys [begin, end), placed from `base` on.

    With dropout the sum of the weights is of all, acc of those that are kept.
    """
    heads = tl.zeros([BLOCK_K], tl.int32) + kv_head
    for block in range(begin, end, BLOCK_K):
        keys = block + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_tile = load_rows(k, keys, k_stride, heads, n_keys, D, D_PADDED)  # [BLOCK_K, D_PADDED]
        scores = dot(q, tl.trans(k_tile))  # [BLOCK_Q, BLOCK_K]
        if MASKED:
            places = (base + keys)[None, :]
            seen = seen_keys(position[:, None], places, window, first, after, MASK, HAS_WINDOW)
            scores = tl.where(seen & (keys < n_keys)[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))  # [BLOCK_Q]
        # A row that has seen nothing yet keeps peak -inf: shift by 0 instead of by -inf.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        shift *= scale
        # In powers of two. One multiply-add an element: the scale is applied here only.
        weights = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(peak * scale - shift)
        v_tile = load_rows(v, keys, v_stride, heads, n_keys, D, D_PADDED)  # [BLOCK_K, D_PADDED]
        acc = acc * decay[:, None]
        kept_weights = weights
        if DROPOUT:
            keep = kept_keys(
                seed, block, position, layer_head, text_key, first_kept, BLOCK_Q, BLOCK_K
            )
            kept_weights = tl.where(keep, weights, 0.0)
        acc += dot(kept_weights.to(v_tile.dtype), v_tile)  # [BLOCK_Q, D_PADDED]
        mass = mass * decay + tl.sum(weights, 1)
        peak = new_peak
    return acc, mass, peak


@triton.jit(do_not_specialize=gpu.PER_BATCH)
def _attention_forward(
    q, k, v, prefix_k, prefix_v, blocks, out, lse, tile_texts, cu_seqlens_q, cu_seqlens_k,
    n_rows, n_texts, n_prefix, q_stride, k_stride, v_stride, prefix_k_stride, prefix_v_stride,
    heads, scale, window, text_keys, seed, layer, first_kept, kept_scale,
    MASK: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_WINDOW: tl.constexpr, DROPOUT: tl.constexpr,
    RESUMED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """RESUMED: out and lse hold the results of other keys, which are to be counted as well."""
    kv_head = tl.program_id(1)
    text, q_start, n_query, k_start, n_key, tile, query, head = query_tile(
        tile_texts, cu_seqlens_q, cu_seqlens_k, kv_head, GROUP, BLOCK_Q
    )
    q_rows = q_start + query
    at = q_rows.to(tl.int64) * heads + head  # [BLOCK_Q], rows of out and lse
    column = tl.arange(0, D_PADDED)
    stored = query < rows_to_store(text, n_texts, q_start, n_query, n_rows)
    if tile * BLOCK_Q >= n_query * GROUP:
        zeros = tl.zeros([BLOCK_Q, D_PADDED], out.dtype.element_ty)
        within = stored[:, None] & (column < D)[None, :]
        tl.store(out + at[:, None] * D + column[None, :], zeros, mask=within)
        tl.store(lse + at, tl.zeros([BLOCK_Q], tl.float32), mask=stored)
        return
    first, after = special_block(blocks, text, MASK)
    layer_head, text_key = dropout_place(layer, head, text_keys, text, DROPOUT)

    position = n_key - n_query + query
    q_tile = load_rows(q, q_rows, q_stride, head, q_start + n_query, D, D_PADDED)
    inside = query < n_query
    acc = tl.zeros([BLOCK_Q, D_PADDED], tl.float32)
    mass = tl.zeros([BLOCK_Q], tl.float32)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    if RESUMED:
        # All other keys together are as one whose score is their lse and whose value is their out.
        acc = load_rows(out, q_rows, heads * D, head, q_start + n_query, D, D_PADDED).to(tl.float32)
        mass += 1.0
        peak = tl.load(lse + at, mask=inside, other=0.0) / (scale * 0.6931471805599453)

    earliest, latest, oldest = tile_positions(
        tile, n_key - n_query, n_prefix, window, HAS_WINDOW, GROUP, BLOCK_Q
    )
    if HAS_PREFIX:
        # Keys in [begin, full) are visible to every row of the tile, those in [full, end) to some.
        begin = (oldest + n_prefix) // BLOCK_K * BLOCK_K
        full = begin
        if MASK != "gem" and not HAS_WINDOW:
            full = n_prefix // BLOCK_K * BLOCK_K
        acc, mass, peak = _attend(
            acc, mass, peak, q_tile, prefix_k, prefix_v, prefix_k_stride, prefix_v_stride,
            n_prefix, begin, full, -n_prefix, position, kv_head, scale, window, first, after,
            0, 0, 0, 0, False, MASK, HAS_WINDOW, False, D, D_PADDED, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        acc, mass, peak = _attend(
            acc, mass, peak, q_tile, prefix_k, prefix_v, prefix_k_stride, prefix_v_stride,
            n_prefix, full, n_prefix, -n_prefix, position, kv_head, scale, window, first, after,
            0, 0, 0, 0, True, MASK, HAS_WINDOW, False, D, D_PADDED, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    begin = tl.maximum(oldest, 0) // BLOCK_K * BLOCK_K
    full = begin
    end = n_key
    if MASK == "bidirectional":
        full = n_key // BLOCK_K * BLOCK_K
    else:
        end = tl.minimum(n_key, latest + 1)
        if MASK == "causal" and not HAS_WINDOW:
            full = (earliest + 1) // BLOCK_K * BLOCK_K
    k += k_start * k_stride
    v += k_start * v_stride
    acc, mass, peak = _attend(
        acc, mass, peak, q_tile, k, v, k_stride, v_stride, n_key, begin, full, 0, position,
        kv_head, scale, window, first, after, seed, layer_head, text_key, first_kept, False,
        MASK, HAS_WINDOW, DROPOUT, D, D_PADDED, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    acc, mass, peak = _attend(
        acc, mass, peak, q_tile, k, v, k_stride, v_stride, n_key, full, end, 0, position,
        kv_head, scale, window, first, after, seed, layer_head, text_key, first_kept, True,
        MASK, HAS_WINDOW, DROPOUT, D, D_PADDED, BLOCK_Q, BLOCK_K,
    )  # fmt: skip

    mass = tl.where(inside, mass, 1.0)  # rows beyond the text may have seen nothing
    if DROPOUT:
        acc *= kept_scale
    tl.store(
        out + at[:, None] * D + column[None, :],
        tl.where(inside[:, None], acc / mass[:, None], 0.0).to(out.dtype.element_ty),
        mask=stored[:, None] & (column < D)[None, :],
    )
    total = (peak * scale + tl.log2(mass)) * 0.6931471805599453
    tl.store(lse + at, tl.where(inside, total, 0.0), mask=stored)


# By architecture and padded head size. Of the short tiles two programs fit a multiprocessor, and
# none spills. The short ones are a guess, not measured.
_TILES_80 = {
    64: Tiles(short=(tile(64, 64, 4, 3),), long=(tile(128, 64, 8, 3),)),
    128: Tiles(short=(tile(64, 32, 4, 2),), long=(tile(128, 32, 8, 3),)),
    256: Tiles(short=(tile(32, 32, 4, 2),), long=(tile(64, 32, 8, 2), tile(64, 64, 8, 1))),
}
_TILES = {
    80: _TILES_80,
    86: {
        **_TILES_80,
        128: Tiles(short=(tile(64, 32, 4, 1),), long=(tile(128, 32, 8, 3),)),
        256: Tiles(short=(tile(32, 32, 4, 1),), long=(tile(64, 32, 8, 2), tile(64, 64, 8, 1))),
    },
    90: {
        64: Tiles(short=(tile(64, 64, 4, 3),), long=(tile(128, 128, 8, 3), tile(128, 64, 8, 3))),
        128: Tiles(
            short=(tile(64, 64, 4, 2), tile(64, 32, 4, 3)),
            long=(tile(128, 64, 8, 3), tile(128, 64, 8, 2)),
        ),
        256: Tiles(short=(tile(32, 32, 4, 2),), long=(tile(64, 64, 8, 2), tile(64, 32, 8, 2))),
    },
}
# Words of the generator take registers: tiles that do not spill beside them.
_TILES_DROPOUT = {
    80: {
        **_TILES[80],
        128: Tiles(short=(tile(64, 32, 4, 3),), long=(tile(128, 32, 8, 3),)),
        256: Tiles(short=(tile(32, 32, 4, 2),), long=(tile(64, 32, 8, 2),)),
    },
    86: {
        **_TILES[86],
        128: Tiles(short=(tile(32, 32, 4, 2),), long=(tile(128, 32, 8, 3),)),
        256: Tiles(short=(tile(32, 32, 4, 1),), long=(tile(64, 32, 8, 2),)),
    },
    90: {
        **_TILES[90],
        256: Tiles(short=(tile(32, 32, 4, 2),), long=(tile(64, 32, 8, 2),)),
    },
}
# Four bytes an element leave room for small tiles only, and there are no float32 tensor cores.
_TILES_FLOAT32 = {
    64: Tiles.of_any_length(tile(64, 32, 4, 2)),
    128: Tiles.of_any_length(tile(32, 16, 4, 2)),
    256: Tiles.of_any_length(tile(16, 16, 4, 2)),
}


def dense_blocks(blocks: Tensor | None) -> Tensor | None:
    """The GEM mask's blocks as the kernels read them."""
    return None if blocks is None else blocks.contiguous()


def dropout_arguments(options: AttentionOptions) -> tuple[Tensor | int | float | None, ...]:
    """text_keys, seed, layer, first_kept and kept_scale of the kernels; None without dropout."""
    words = options.text_words
    if words is None:
        return None, None, None, None, None
    return words, options.seed, options.layer, options.first_kept, options.kept_scale


def _tiles(q: Tensor, options: AttentionOptions, rows: int) -> tuple[Tile, ...]:
    half = _TILES_DROPOUT if options.dropout else _TILES
    return pinned(q, half, _TILES_FLOAT32, rows, options.texts)


def attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """See `op.attention`; also returns the log-sum-exp [Tq, H] of the scores, float32."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    rows, heads, size = q.shape
    out = q.new_empty(rows, heads, size)
    lse = q.new_empty(rows, heads, dtype=torch.float32)
    if not rows or not options.texts:
        return out.zero_(), lse.zero_()
    in_group = rows * heads // k.shape[1]
    for keys in passes(q, k, v, options, _tiles(q, options, in_group)[0].blocks["BLOCK_Q"]):
        tiles = _tiles(q, keys.options, in_group)
        arguments, constants = query_launch(tiles, q, keys, out, lse)
        gpu.launch_tiled(_attention_forward, *arguments, **constants)
    return out, lse


def query_launch(
    tiles: tuple[Tile, ...], q: Tensor, keys: Pass, *tensors: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and constants of `gpu.launch_tiled` for a kernel over tiles of queries.

    tensors: the kernel's own, which come after those of every such kernel.
    """
    k, v, options, resumed = keys
    rows, heads, size = q.shape
    texts, kv_heads = options.texts, k.shape[1]
    prefix_k, prefix_v = options.prefix or (k, v)
    group = heads // kv_heads
    block = tiles[0].blocks["BLOCK_Q"]
    arguments = (
        lambda constants: (tile_count(rows, texts, group, block), kv_heads),
        tiles,
        ("GROUP", "D"),
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        dense_blocks(options.blocks),
        *tensors,
        tile_texts(options, options.cu_seqlens_q, rows, group, block),
        options.cu_seqlens_q,
        options.cu_seqlens_k,
        rows,
        texts,
        0 if options.prefix_k is None else len(prefix_k),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        prefix_k.stride(0),
        prefix_v.stride(0),
        heads,
        LOG2_E * size**-0.5,
        options.window or 0,
        *dropout_arguments(options),
    )
    return arguments, {
        "MASK": options.mask,
        "HAS_PREFIX": options.prefix_k is not None,
        "HAS_WINDOW": options.window is not None,
        "DROPOUT": options.dropout > 0,
        "RESUMED": resumed,
        "GROUP": group,
        "D": size,
        "D_PADDED": padded(size),
    }
