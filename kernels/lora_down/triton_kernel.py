"""LoRA's down projection in Triton: what is dropped is drawn in registers, beside the products.

No dropped copy of x is written or kept. Each kernel draws the same words of the generator again.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.attention.triton_kernel import dot
from gen_fast.ops.dropout.philox import threshold, words_of
from gen_fast.ops.dropout.triton_kernel import kept
from gen_fast.ops.layout import adjacent

from .op import PARTS
from .reference import Dropped, wide

BLOCK_T, BLOCK_K = 64, 128
# Rows that one program sums the gradient of A over; what comes of them is added in a second pass,
# so that a run repeats the one before to the bit.
SPLIT_ROWS, SPLITS = 1024, 32


@triton.jit
def _stream_of(part, s0, s1, s2, s3):
    """The dropout stream of a part, apart from those of attention's layers."""
    stream = tl.where(part == 0, s0, tl.where(part == 1, s1, tl.where(part == 2, s2, s3)))
    return stream.to(tl.uint32) | 0x80000000


@triton.jit
def _kept_tile(
    seed, block, position, stream, key, first_kept, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Which elements [BLOCK_T, BLOCK_K] of columns from `block` on are kept."""
    counters = block // 4 + tl.arange(0, BLOCK_K // 4)
    keep = kept(seed, counters[None, :], position[:, None], stream, key[:, None], first_kept)
    return tl.reshape(keep, (BLOCK_T, BLOCK_K))


@triton.jit
def _tile(x, row, column, stride, n_rows, size):
    """Elements of rows `row` and columns `column`; 0 outside."""
    inside = (row < n_rows)[:, None] & (column < size)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _factor_tile(a, part, column, size, RANK: tl.constexpr, RANK_PADDED: tl.constexpr):
    """A [RANK_PADDED, BLOCK_K] of a part at columns `column`; 0 beyond the rank."""
    rank = tl.arange(0, RANK_PADDED)
    inside = (rank < RANK)[:, None] & (column < size)[None, :]
    return tl.load(a + (part * RANK + rank)[:, None] * size + column[None, :], mask=inside, other=0)


@triton.jit(do_not_specialize=(*gpu.PER_BATCH, "s0", "s1", "s2", "s3"))
def _lora_down(
    x, a, text_keys, positions, out, n_rows, size, stride, seed, first_kept, scale,
    s0, s1, s2, s3, COUNT: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    position = tl.load(positions + row, mask=row < n_rows, other=0).to(tl.int32)
    key = tl.load(text_keys + row, mask=row < n_rows, other=0)
    stream = _stream_of(part, s0, s1, s2, s3)
    acc = tl.zeros([BLOCK_T, RANK_PADDED], tl.float32)
    for block in range(0, size, BLOCK_K):
        column = block + tl.arange(0, BLOCK_K)
        x_tile = _tile(x, row, column, stride, n_rows, size)
        keep = _kept_tile(seed, block, position, stream, key, first_kept, BLOCK_T, BLOCK_K)
        x_tile = tl.where(keep, x_tile, 0.0).to(x_tile.dtype)
        a_tile = _factor_tile(a, part, column, size, RANK, RANK_PADDED)
        acc += dot(x_tile, tl.trans(a_tile))
    rank = tl.arange(0, RANK_PADDED)
    tl.store(
        out + row.to(tl.int64)[:, None] * (COUNT * RANK) + (part * RANK + rank)[None, :],
        (acc * scale).to(out.dtype.element_ty),
        mask=(row < n_rows)[:, None] & (rank < RANK)[None, :],
    )


@triton.jit(do_not_specialize=(*gpu.PER_BATCH, "s0", "s1", "s2", "s3"))
def _lora_down_dx(
    grad, a, text_keys, positions, dx, n_rows, size, seed, first_kept, scale,
    s0, s1, s2, s3, COUNT: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    block = tl.program_id(1) * BLOCK_K
    column = block + tl.arange(0, BLOCK_K)
    rank = tl.arange(0, RANK_PADDED)
    position = tl.load(positions + row, mask=row < n_rows, other=0).to(tl.int32)
    key = tl.load(text_keys + row, mask=row < n_rows, other=0)
    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for part in tl.static_range(COUNT):
        up = _tile(grad + part * RANK, row, rank, COUNT * RANK, n_rows, RANK)
        product = dot(up, _factor_tile(a, part, column, size, RANK, RANK_PADDED))
        stream = _stream_of(part, s0, s1, s2, s3)
        keep = _kept_tile(seed, block, position, stream, key, first_kept, BLOCK_T, BLOCK_K)
        acc += tl.where(keep, product, 0.0)
    tl.store(
        dx + row.to(tl.int64)[:, None] * size + column[None, :],
        (acc * scale).to(dx.dtype.element_ty),
        mask=(row < n_rows)[:, None] & (column < size)[None, :],
    )


@triton.jit(do_not_specialize=(*gpu.PER_BATCH, "s0", "s1", "s2", "s3", "rows_each"))
def _lora_down_da(
    grad, x, text_keys, positions, sums, n_rows, size, stride, seed, first_kept, scale,
    rows_each, s0, s1, s2, s3, COUNT: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCK_K
    part, split = tl.program_id(1), tl.program_id(2)
    column = block + tl.arange(0, BLOCK_K)
    rank = tl.arange(0, RANK_PADDED)
    stream = _stream_of(part, s0, s1, s2, s3)
    acc = tl.zeros([RANK_PADDED, BLOCK_K], tl.float32)
    end = tl.minimum((split + 1) * rows_each, n_rows)
    for start in range(split * rows_each, end, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        position = tl.load(positions + row, mask=row < end, other=0).to(tl.int32)
        key = tl.load(text_keys + row, mask=row < end, other=0)
        up = _tile(grad + part * RANK, row, rank, COUNT * RANK, end, RANK)
        x_tile = _tile(x, row, column, stride, end, size)
        keep = _kept_tile(seed, block, position, stream, key, first_kept, BLOCK_T, BLOCK_K)
        x_tile = tl.where(keep, x_tile, 0.0).to(x_tile.dtype)
        acc += dot(tl.trans(up), x_tile)
    place = (split * COUNT + part) * RANK + rank
    tl.store(
        sums + place[:, None] * size + column[None, :],
        acc * scale,
        mask=(rank < RANK)[:, None] & (column < size)[None, :],
    )


def lora_down(x: Tensor, a: Tensor, dropped: Dropped) -> Tensor:
    """See `op.lora_down`."""
    x, a = adjacent(x), a.contiguous()
    rows, size = x.shape
    out = x.new_empty(rows, len(a))
    if out.numel():
        gpu.launch(
            _lora_down,
            (triton.cdiv(rows, BLOCK_T), len(dropped.streams)),
            x,
            a,
            words_of(dropped.text_keys),
            dropped.positions.contiguous(),
            out,
            rows,
            size,
            x.stride(0),
            *_settings(dropped),
            **_constants(a, dropped.streams),
        )
    return out


def lora_down_backward(
    grad: Tensor, x: Tensor, a: Tensor, dropped: Dropped
) -> tuple[Tensor, Tensor]:
    """See `op.lora_down_backward`."""
    grad, x, a = grad.contiguous(), adjacent(x), a.contiguous()
    rows, size = x.shape
    dx = x.new_empty(rows, size)
    rows_each = max(SPLIT_ROWS, triton.cdiv(triton.cdiv(rows, SPLITS), BLOCK_T) * BLOCK_T)
    splits = triton.cdiv(rows, rows_each)
    sums = a.new_empty(splits, *a.shape, dtype=wide(a.dtype))
    if dx.numel():
        where = words_of(dropped.text_keys), dropped.positions.contiguous()
        settings, constants = _settings(dropped), _constants(a, dropped.streams)
        blocks = triton.cdiv(size, constants["BLOCK_K"])
        gpu.launch(
            _lora_down_dx,
            (triton.cdiv(rows, BLOCK_T), blocks),
            grad,
            a,
            *where,
            dx,
            rows,
            size,
            *settings,
            **constants,
            num_warps=8,  # with 4 the words of the generator spill
        )
        gpu.launch(
            _lora_down_da,
            (blocks, len(dropped.streams), splits),
            grad,
            x,
            *where,
            sums,
            rows,
            size,
            x.stride(0),
            *settings[:3],
            rows_each,
            *settings[3:],
            **constants,
        )
    return dx, sums.sum(0)


def _settings(dropped: Dropped) -> tuple[float, ...]:
    """seed, first_kept, scale and the streams of the kernels."""
    p, streams = dropped.p, dropped.streams
    more = [0] * (PARTS - len(streams))
    return dropped.seed, threshold(p), 1 / (1 - p), *streams, *more


def _constants(a: Tensor, streams: Sequence[int]) -> dict[str, int]:
    rank = len(a) // len(streams)
    return {
        "COUNT": len(streams),
        "RANK": rank,
        "RANK_PADDED": max(16, gpu.power_of_two(rank)),
        "BLOCK_T": BLOCK_T,
        # Sixteen-bit operands come in longer rows; those of float32 leave room for less.
        "BLOCK_K": BLOCK_K if a.dtype != torch.float32 else BLOCK_K // 2,
    }
