"""When the Triton kernels attend a shared prefix first, by the rows of all texts together.

A tile belongs to one text. Where texts are short, much of a tile is empty, and its products with
the keys of a long prefix are wasted; a tile of rows of all texts is full. Its results then count
as one more key in the pass over the texts' own keys: Ye et al., arXiv 2501.01005, §3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .options import AttentionOptions

# What an H100 reached: 122 TFLOP/s of attention, 2.94 TB/s (bench/README.md).
FLOP_PER_BYTE = 42
# A launch more takes as long as so many bytes: 2 µs.
LAUNCH_BYTES = 6_000_000


class Pass(NamedTuple):
    """One run of the kernels over queries. resumed: it adds to the results of the one before."""

    k: Tensor
    v: Tensor
    options: AttentionOptions
    resumed: bool


def passes(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, block_q: int
) -> tuple[Pass, ...]:
    """All keys in one pass over tiles of `block_q` rows, or first the prefix and then the rest."""
    prefix = options.prefix
    if prefix is None or not prefix_first(q, k, options, block_q):
        return (Pass(k, v, options, resumed=False),)
    rows, n_prefix = len(q), len(prefix[0])

    def one_text() -> AttentionOptions:
        """All rows, those of padding too, as one text that sees every key of the prefix."""
        queries, keys = (
            torch.arange(0, 2 * count, count, dtype=torch.int32, device=q.device)
            for count in (rows, n_prefix)
        )
        return AttentionOptions(queries, keys, mask="bidirectional")

    together: AttentionOptions = options.once_a_batch(("all rows", rows, n_prefix), one_text)
    return (
        Pass(prefix[0], prefix[1], together, resumed=False),
        Pass(k, v, options.without_prefix(), resumed=True),
    )


def prefix_first(q: Tensor, k: Tensor, options: AttentionOptions, block_q: int) -> bool:
    """Whether FLOPs saved in empty rows of tiles outweigh a launch, and results written and read.

    It depends on shapes alone: the mean length stands for all lengths. Masks and windows that hide
    keys of the prefix from some rows go one way only.
    """
    if options.prefix_k is None or options.mask == "gem" or options.window is not None:
        return False
    rows, heads, size = q.shape
    texts, kv_heads = options.texts, k.shape[1]
    in_group = rows * heads // kv_heads
    tiles = texts * -(-in_group // (texts * block_q))
    full_tiles = -(-in_group // block_q)
    saved = 4 * size * block_q * (tiles - full_tiles) * kv_heads * len(options.prefix_k)
    # Results are written and read, queries are read again; of lse 4 bytes twice.
    added = rows * heads * (3 * size * q.element_size() + 8)
    return saved > FLOP_PER_BYTE * (added + LAUNCH_BYTES)
