"""Tiles of the Triton kernels: which text owns each, how large they are, and their pinned sizes.

Text i owns the tiles from rows(i) // BLOCK + i on, where rows(i) counts the rows before it: enough
for its own, increasing in i, and known without a host sync.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import gpu
from gen_fast.ops.gpu import Tile

from .options import AttentionOptions

# Texts of fewer rows than this on average, a row being a (position, query head of a group) pair,
# take the short tiles: of the rows of a text's 128-row tiles a quarter would be empty. (Counted,
# not measured.)
SHORT = 256


@triton.jit
def first_tile(text, start, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Number of the first tile of a text, which begins at row `start` of the packed ones."""
    return start * GROUP // BLOCK + text


@triton.jit
def query_tile(
    tile_texts, cu_seqlens_q, cu_seqlens_k, kv_head, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """The tile of queries that a program works on, and the text that owns it.

    Returns the text; its first row of q, and its queries; its first row of k (int64), and its keys;
    the number of the tile in the text; and of its rows [BLOCK_Q] the query in the text and the
    head.
    """
    text = tl.load(tile_texts + tl.program_id(0))
    q_start = tl.load(cu_seqlens_q + text)
    tile = tl.program_id(0) - first_tile(text, q_start, GROUP, BLOCK_Q)
    n_query = tl.load(cu_seqlens_q + text + 1) - q_start
    k_start = tl.load(cu_seqlens_k + text).to(tl.int64)
    n_key = tl.load(cu_seqlens_k + text + 1) - k_start.to(tl.int32)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    return text, q_start, n_query, k_start, n_key, tile, row // GROUP, kv_head * GROUP + row % GROUP


@triton.jit
def tile_positions(
    tile, first, n_prefix, window, HAS_WINDOW: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Own positions of the first and the last query of a tile, and of the oldest key they may see.

    first: own position of the text's first query.
    """
    earliest = first + tile * BLOCK_Q // GROUP
    latest = first + (tile * BLOCK_Q + BLOCK_Q - 1) // GROUP
    oldest = -n_prefix
    if HAS_WINDOW:
        oldest = tl.maximum(earliest - window + 1, oldest)
    return earliest, latest, oldest


@triton.jit(do_not_specialize=gpu.PER_BATCH)
def _tile_texts(
    texts, cu_seqlens, n_rows, n_texts, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the number of one text to the tiles that it owns; those left over are the last's."""
    text = tl.program_id(0)
    first = first_tile(text, tl.load(cu_seqlens + text), GROUP, BLOCK)
    # The last one's tiles are also those that rows of padding, behind it, need.
    end = tl.where(text == n_texts - 1, n_rows, tl.load(cu_seqlens + text + 1))
    following = first_tile(text + 1, end, GROUP, BLOCK)
    for start in range(first, following, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        tl.store(texts + tile, tl.zeros([CHUNK], tl.int32) + text, mask=tile < following)


def tile_count(rows: int, texts: int, group: int, block: int) -> int:
    """Tiles of `block` rows that are enough for `texts` texts of `rows` rows together."""
    return rows * group // block + texts


def tile_texts(
    options: AttentionOptions, cu_seqlens: Tensor, rows: int, group: int, block: int
) -> Tensor:
    """The text that owns each tile, [tile_count] int32: made once for all layers of a batch.

    cu_seqlens: one of the two of options. rows: with those of padding.
    """

    def make() -> Tensor:
        count = tile_count(rows, options.texts, group, block)
        texts = torch.empty(count, dtype=torch.int32, device=cu_seqlens.device)
        gpu.launch(
            _tile_texts,
            (options.texts,),
            texts,
            cu_seqlens,
            rows,
            options.texts,
            GROUP=group,
            BLOCK=block,
            CHUNK=128,
            num_warps=1,
        )
        return texts

    side = "q" if cu_seqlens is options.cu_seqlens_q else "k"
    name = ("tile texts", side, rows, group, block)
    result: Tensor = options.once_a_batch(name, make)
    return result


@dataclass(frozen=True)
class Tiles:
    """Pinned tiles for texts below SHORT rows on average, and for longer ones, each best first.

    Those of one length have the same block of what owns tiles, queries or keys: GEN_FAST_AUTOTUNE
    measures them with one table of texts.
    """

    short: tuple[Tile, ...]
    long: tuple[Tile, ...]

    @classmethod
    def of_any_length(cls, *tiles: Tile) -> Self:
        """The same for short texts and long ones."""
        return cls(tiles, tiles)


def tile(block_q: int, block_k: int, warps: int, stages: int) -> Tile:
    """Rows of queries and keys that a program holds at a time, and how they are worked on."""
    return Tile({"BLOCK_Q": block_q, "BLOCK_K": block_k}, warps, stages)


def padded(size: int) -> int:
    """The head size in the tiles: 64, 128 or 256, so that few shapes are compiled and tuned."""
    return max(64, gpu.power_of_two(size))


BySize = Mapping[int, Tiles]  # by padded head size


def pinned(
    q: Tensor, half: Mapping[int, BySize], float32: BySize, rows: int, texts: int
) -> tuple[Tile, ...]:
    """Tiles for q's dtype, head size and GPU, and for `texts` texts of `rows` rows; best first.

    rows: of positions and the heads of a group. Raises OpError for a head size too large.
    """
    size = padded(q.shape[2])
    if size not in float32:
        raise OpError(f"the Triton kernels take heads of up to {max(float32)}, not {q.shape[2]}")
    by_size = float32 if q.dtype == torch.float32 else half[gpu.tile_architecture(q.device)]
    return by_size[size].short if rows < SHORT * texts else by_size[size].long
