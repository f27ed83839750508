"""Packed attention with a shared prefix in Triton, backward (Dao, arXiv 2307.08691, algorithm 2).

Two kernels, no atomics, so the same bits every time. One goes over tiles of queries for the
gradient of q, and stores delta = sum(out · dout) on the way; the other goes over tiles of a
text's own keys for those of k and v, reading delta. The prefix is frozen: it gets no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.gpu import Tile
from gen_fast.ops.layout import dense_rows

from .options import AttentionOptions
from .triton_kernel import (
    LOG2_E,
    dense_blocks,
    dot,
    dropout_arguments,
    dropout_place,
    kept_keys,
    load_rows,
    query_launch,
    rows_to_store,
    seen_keys,
    special_block,
)
from .triton_prefix import passes
from .triton_tiles import (
    Tiles,
    first_tile,
    padded,
    pinned,
    query_tile,
    tile,
    tile_count,
    tile_positions,
    tile_texts,
)


@triton.jit
def _query_gradient(
    dq, q, dout, lse, delta, k, v, k_stride, v_stride, n_keys, begin, end, base, position,
    kv_head, scale, window, first, after, seed, layer_head, text_key, first_kept, kept_scale,
    MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add what keys [begin, end) give to the gradient of one query tile."""
    heads = tl.zeros([BLOCK_K], tl.int32) + kv_head
    for block in range(begin, end, BLOCK_K):
        keys = block + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        k_tile = load_rows(k, keys, k_stride, heads, n_keys, D, D_PADDED)  # [BLOCK_K, D_PADDED]
        v_tile = load_rows(v, keys, v_stride, heads, n_keys, D, D_PADDED)  # [BLOCK_K, D_PADDED]
        scores = dot(q, tl.trans(k_tile)) * scale  # [BLOCK_Q, BLOCK_K]
        places = (base + keys)[None, :]
        seen = seen_keys(position[:, None], places, window, first, after, MASK, HAS_WINDOW)
        weights = tl.exp2(scores - lse[:, None])
        weights = tl.where(seen & (keys < n_keys)[None, :], weights, 0.0)
        dweights = dot(dout, tl.trans(v_tile))  # [BLOCK_Q, BLOCK_K]
        if DROPOUT:
            keep = kept_keys(
                seed, block, position, layer_head, text_key, first_kept, BLOCK_Q, BLOCK_K
            )
            dweights = tl.where(keep, dweights * kept_scale, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq += dot(dscores.to(k_tile.dtype), k_tile)  # [BLOCK_Q, D_PADDED]
    return dq


@triton.jit(do_not_specialize=gpu.PER_BATCH)
def _attention_queries(
    q, k, v, prefix_k, prefix_v, blocks, dout, out, lse, delta, dq, tile_texts, cu_seqlens_q,
    cu_seqlens_k, n_rows, n_texts, n_prefix, q_stride, k_stride, v_stride, prefix_k_stride,
    prefix_v_stride, heads, scale, window, text_keys, seed, layer, first_kept, kept_scale,
    MASK: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_WINDOW: tl.constexpr, DROPOUT: tl.constexpr,
    RESUMED: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """RESUMED: dq holds the share of other keys, to which this is added."""
    kv_head = tl.program_id(1)
    text, q_start, n_query, k_start, n_key, tile, query, head = query_tile(
        tile_texts, cu_seqlens_q, cu_seqlens_k, kv_head, GROUP, BLOCK_Q
    )
    q_rows = q_start + query
    at = q_rows.to(tl.int64) * heads + head
    column = tl.arange(0, D_PADDED)
    stored = query < rows_to_store(text, n_texts, q_start, n_query, n_rows)
    within = stored[:, None] & (column < D)[None, :]
    if tile * BLOCK_Q >= n_query * GROUP:
        zeros = tl.zeros([BLOCK_Q, D_PADDED], dq.dtype.element_ty)
        tl.store(dq + at[:, None] * D + column[None, :], zeros, mask=within)
        return
    first, after = special_block(blocks, text, MASK)
    layer_head, text_key = dropout_place(layer, head, text_keys, text, DROPOUT)

    position = n_key - n_query + query
    q_end = q_start + n_query
    q_tile = load_rows(q, q_rows, q_stride, head, q_end, D, D_PADDED)  # [BLOCK_Q, D_PADDED]
    dout_tile = load_rows(dout, q_rows, heads * D, head, q_end, D, D_PADDED)  # [BLOCK_Q, D_PADDED]
    out_tile = load_rows(out, q_rows, heads * D, head, q_end, D, D_PADDED)  # [BLOCK_Q, D_PADDED]
    inside = query < n_query
    mass = tl.load(lse + at, mask=inside, other=0.0) * 1.4426950408889634
    shift = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)  # [BLOCK_Q]
    tl.store(delta + at, shift, mask=inside)
    # Scores are in powers of two: scale · ln 2 is 1/√D.
    root = scale * 0.6931471805599453
    dq_sum = tl.zeros([BLOCK_Q, D_PADDED], tl.float32)
    if RESUMED:
        dq_sum += load_rows(dq, q_rows, heads * D, head, q_end, D, D_PADDED).to(tl.float32) / root

    _, latest, oldest = tile_positions(
        tile, n_key - n_query, n_prefix, window, HAS_WINDOW, GROUP, BLOCK_Q
    )
    if HAS_PREFIX:
        dq_sum = _query_gradient(
            dq_sum, q_tile, dout_tile, mass, shift, prefix_k, prefix_v, prefix_k_stride,
            prefix_v_stride, n_prefix, (oldest + n_prefix) // BLOCK_K * BLOCK_K, n_prefix,
            -n_prefix, position, kv_head, scale, window, first, after, 0, 0, 0, 0, 0, MASK,
            HAS_WINDOW, False, D, D_PADDED, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    end = n_key
    if MASK != "bidirectional":
        end = tl.minimum(n_key, latest + 1)
    dq_sum = _query_gradient(
        dq_sum, q_tile, dout_tile, mass, shift, k + k_start * k_stride, v + k_start * v_stride,
        k_stride, v_stride, n_key, tl.maximum(oldest, 0) // BLOCK_K * BLOCK_K, end, 0, position,
        kv_head, scale, window, first, after, seed, layer_head, text_key, first_kept, kept_scale,
        MASK, HAS_WINDOW, DROPOUT, D, D_PADDED, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    dq_sum = tl.where(inside[:, None], dq_sum * root, 0.0)
    tl.store(dq + at[:, None] * D + column[None, :], dq_sum.to(dq.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=gpu.PER_BATCH)
def _attention_keys(
    dout, q, k, v, blocks, lse, delta, dk, dv, tile_texts, cu_seqlens_q, cu_seqlens_k, n_rows,
    n_texts, q_stride, k_stride, v_stride, heads, scale, window, text_keys, seed, layer, first_kept,
    kept_scale,
    MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, DROPOUT: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    text = tl.load(tile_texts + tl.program_id(0))
    q_start = tl.load(cu_seqlens_q + text)
    n_query = tl.load(cu_seqlens_q + text + 1) - q_start
    k_start = tl.load(cu_seqlens_k + text)
    n_key = tl.load(cu_seqlens_k + text + 1) - k_start
    tile = tl.program_id(0) - first_tile(text, k_start, 1, BLOCK_K)
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    k_rows = k_start + key
    column = tl.arange(0, D_PADDED)
    at = (k_rows.to(tl.int64) * (heads // GROUP) + kv_head)[:, None] * D + column[None, :]
    stored = key < rows_to_store(text, n_texts, k_start, n_key, n_rows)
    within = stored[:, None] & (column < D)[None, :]
    if tile * BLOCK_K >= n_key:
        zeros = tl.zeros([BLOCK_K, D_PADDED], dk.dtype.element_ty)
        tl.store(dk + at, zeros, mask=within)
        tl.store(dv + at, zeros, mask=within)
        return
    first, after = special_block(blocks, text, MASK)
    text_key = 0
    if DROPOUT:
        text_key = tl.load(text_keys + text)

    k_heads = tl.zeros([BLOCK_K], tl.int32) + kv_head
    k_tile = load_rows(k, k_rows, k_stride, k_heads, k_start + n_key, D, D_PADDED)
    v_tile = load_rows(v, k_rows, v_stride, k_heads, k_start + n_key, D, D_PADDED)
    dk_sum = tl.zeros([BLOCK_K, D_PADDED], tl.float32)
    dv_sum = tl.zeros([BLOCK_K, D_PADDED], tl.float32)

    begin, end = 0, n_query * GROUP
    if MASK != "bidirectional":
        begin = tl.maximum(tile * BLOCK_K - (n_key - n_query), 0) * GROUP
        if HAS_WINDOW:
            latest = tl.minimum(tile * BLOCK_K + BLOCK_K, n_key) - 1 + window - 1
            end = tl.minimum(end, (latest - (n_key - n_query) + 1) * GROUP)
    for start in range(begin, end, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
        query = row // GROUP
        head = kv_head * GROUP + row % GROUP
        q_rows = q_start + query
        q_end = q_start + n_query
        q_tile = load_rows(q, q_rows, q_stride, head, q_end, D, D_PADDED)  # [BLOCK_Q, D_PADDED]
        dout_tile = load_rows(dout, q_rows, heads * D, head, q_end, D, D_PADDED)
        inside = query < n_query
        of_query = q_rows.to(tl.int64) * heads + head
        mass = tl.load(lse + of_query, mask=inside, other=0.0) * 1.4426950408889634
        shift = tl.load(delta + of_query, mask=inside, other=0.0)
        # Keys by queries: weights and their gradients are left sides of products as they are.
        scores = dot(k_tile, tl.trans(q_tile)) * scale  # [BLOCK_K, BLOCK_Q]
        position = n_key - n_query + query
        at_query = position[None, :]
        seen = seen_keys(at_query, key[:, None], window, first, after, MASK, HAS_WINDOW)
        weights = tl.where(seen & inside[None, :], tl.exp2(scores - mass[None, :]), 0.0)
        kept_weights = weights
        if DROPOUT:
            keep = tl.trans(
                kept_keys(
                    seed, tile * BLOCK_K, position, layer * 65536 + head, text_key, first_kept,
                    BLOCK_Q, BLOCK_K,
                )
            )  # fmt: skip
            kept_weights = tl.where(keep, weights, 0.0)
        dv_sum += dot(kept_weights.to(dout_tile.dtype), dout_tile)  # [BLOCK_K, D_PADDED]
        dweights = dot(v_tile, tl.trans(dout_tile))  # [BLOCK_K, BLOCK_Q]
        if DROPOUT:
            dweights = tl.where(keep, dweights * kept_scale, 0.0)
        dscores = (weights * (dweights - shift[None, :])).to(q_tile.dtype)
        dk_sum += dot(dscores, q_tile)  # [BLOCK_K, D_PADDED]

    dk_sum *= scale * 0.6931471805599453
    if DROPOUT:
        dv_sum *= kept_scale
    # Of the rows of padding in the tile: nothing.
    inside_k = (key < n_key)[:, None]
    dk_tile = tl.where(inside_k, dk_sum, 0.0).to(dk.dtype.element_ty)
    dv_tile = tl.where(inside_k, dv_sum, 0.0).to(dv.dtype.element_ty)
    tl.store(dk + at, dk_tile, mask=within)
    tl.store(dv + at, dv_tile, mask=within)


# As in triton_kernel.py, and half as large: the accumulators take the registers.
_QUERY_TILES_80 = {
    64: Tiles.of_any_length(tile(64, 32, 4, 2)),
    128: Tiles(short=(tile(64, 32, 4, 2),), long=(tile(64, 64, 8, 1), tile(64, 64, 8, 2))),
    256: Tiles(short=(tile(32, 32, 4, 1),), long=(tile(32, 32, 8, 1),)),
}
_QUERY_TILES = {
    80: _QUERY_TILES_80,
    86: {
        **_QUERY_TILES_80,
        128: Tiles(short=(tile(32, 32, 4, 2),), long=(tile(64, 64, 8, 2),)),
        256: Tiles(short=(tile(16, 32, 4, 1),), long=(tile(32, 32, 8, 1),)),
    },
    90: {
        64: Tiles(short=(tile(64, 64, 4, 2),), long=(tile(64, 64, 4, 3), tile(64, 64, 8, 2))),
        128: Tiles(
            short=(tile(64, 64, 4, 2), tile(64, 32, 4, 2)),
            long=(tile(64, 64, 8, 2), tile(64, 64, 4, 2)),
        ),
        256: Tiles(short=(tile(32, 32, 4, 2),), long=(tile(32, 32, 8, 2),)),
    },
}
_KEY_TILES_80 = {
    64: Tiles(short=(tile(64, 32, 4, 2),), long=(tile(32, 64, 4, 2),)),
    128: Tiles(short=(tile(32, 32, 4, 1),), long=(tile(64, 64, 8, 1), tile(64, 64, 8, 2))),
    256: Tiles(short=(tile(16, 32, 4, 1),), long=(tile(32, 32, 8, 1),)),
}
_KEY_TILES = {
    80: _KEY_TILES_80,
    86: {
        **_KEY_TILES_80,
        256: Tiles(short=(tile(16, 16, 4, 1),), long=(tile(32, 32, 8, 1),)),
    },
    90: {
        64: Tiles(short=(tile(32, 64, 4, 3),), long=(tile(64, 64, 4, 3), tile(64, 64, 8, 2))),
        128: Tiles(
            short=(tile(32, 64, 4, 1), tile(16, 64, 4, 2)),
            long=(tile(64, 64, 8, 2), tile(32, 64, 8, 2)),
        ),
        256: Tiles(short=(tile(16, 32, 4, 1),), long=(tile(32, 32, 8, 2), tile(32, 32, 8, 1))),
    },
}
_KEY_TILES_DROPOUT_80 = {
    64: Tiles.of_any_length(tile(64, 32, 4, 2)),
    128: Tiles(short=(tile(32, 32, 4, 1),), long=(tile(64, 64, 8, 1),)),
    256: Tiles(short=(tile(16, 16, 4, 1),), long=(tile(32, 32, 8, 1),)),
}
_KEY_TILES_DROPOUT = {
    80: _KEY_TILES_DROPOUT_80,
    86: _KEY_TILES_DROPOUT_80,
    90: {
        64: Tiles(short=(tile(32, 64, 4, 3),), long=(tile(64, 64, 4, 3),)),
        128: Tiles(short=(tile(16, 64, 4, 2),), long=(tile(64, 64, 8, 2),)),
        256: Tiles(short=(tile(16, 16, 4, 2),), long=(tile(32, 32, 8, 1),)),
    },
}
_TILES_FLOAT32 = {
    64: Tiles.of_any_length(tile(32, 32, 4, 1)),
    128: Tiles.of_any_length(tile(16, 32, 4, 1)),
    256: Tiles.of_any_length(tile(16, 16, 4, 1)),
}


def _query_tiles(q: Tensor, options: AttentionOptions, rows: int) -> tuple[Tile, ...]:
    return pinned(q, _QUERY_TILES, _TILES_FLOAT32, rows, options.texts)


def _key_tiles(k: Tensor, options: AttentionOptions) -> tuple[Tile, ...]:
    half = _KEY_TILES_DROPOUT if options.dropout else _KEY_TILES
    return pinned(k, half, _TILES_FLOAT32, len(k), options.texts)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `out` and `lse` are the results of the forward pass."""
    dout, q, k, v = dout.contiguous(), dense_rows(q), dense_rows(k), dense_rows(v)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not len(q) or not options.texts:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    in_group = q.shape[0] * q.shape[1] // k.shape[1]
    for keys in passes(q, k, v, options, _query_tiles(q, options, in_group)[0].blocks["BLOCK_Q"]):
        tiles = _query_tiles(q, keys.options, in_group)
        arguments, constants = query_launch(tiles, q, keys, dout, out, lse, delta, dq)
        gpu.launch_tiled(_attention_queries, *arguments, **constants)
    _run_keys(dout, q, k, v, options, lse, delta, dk, dv)
    return dq, dk, dv


def _run_keys(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Fill dk and dv."""
    rows, kv_heads, size = k.shape
    heads, texts = q.shape[1], options.texts
    group = heads // kv_heads
    tiles = _key_tiles(k, options)
    block = tiles[0].blocks["BLOCK_K"]
    gpu.launch_tiled(
        _attention_keys,
        lambda constants: (tile_count(rows, texts, 1, block), kv_heads),
        tiles,
        ("GROUP", "D"),
        dout,
        q,
        k,
        v,
        dense_blocks(options.blocks),
        lse,
        delta,
        dk,
        dv,
        tile_texts(options, options.cu_seqlens_k, rows, 1, block),
        options.cu_seqlens_q,
        options.cu_seqlens_k,
        rows,
        texts,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        heads,
        LOG2_E * size**-0.5,
        options.window or 0,
        *dropout_arguments(options),
        MASK=options.mask,
        HAS_WINDOW=options.window is not None,
        DROPOUT=options.dropout > 0,
        GROUP=group,
        D=size,
        D_PADDED=padded(size),
    )
