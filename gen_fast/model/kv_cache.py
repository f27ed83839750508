"""Keys and values of the texts of a batch, for tokens that follow them in a later pass.

Decoding adds a token a pass; training runs the special tokens, with gradient, after queries that
were run without. Attention finds a text's keys by offsets, so the unused end of a text's region is
given to attention as one more text, without queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.batch import PackedBatch, on_device
from gen_fast.model.config import BackboneConfig


@dataclass(frozen=True)
class Placement:
    """Where the rows of a batch go in a cache, and how attention sees the cache afterwards.

    rows [T]: int64, buffer row of each row of the batch. q_offsets, row_offsets, k_offsets: int32,
    as attention takes them: all rows of the batch, its needed rows, and the keys. Regions with
    unused rows count as two texts, the second without queries.
    """

    rows: Tensor
    q_offsets: Tensor
    row_offsets: Tensor
    k_offsets: Tensor


class KVCache:
    """Keys (after RoPE) and values of B texts; text i has room for `capacities[i]` tokens.

    layers: a [sum of capacities, KV, D] pair a layer. lengths [B]: tokens held. active: the texts
    that the next batch continues, all at first. Under autograd `extend` makes new buffers, so that
    gradients reach the keys and values that it was given.
    """

    def __init__(
        self,
        config: BackboneConfig,
        capacities: Sequence[int] | np.ndarray,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.starts = np.concatenate(([0], np.cumsum(capacities, dtype=np.int64)))
        self.lengths = np.zeros(len(capacities), dtype=np.int64)
        self.active = np.arange(len(capacities))
        self.device = torch.device(device)
        shape = (int(self.starts[-1]), config.num_kv_heads, config.head_dim)
        self.layers = [
            (
                torch.empty(shape, dtype=dtype, device=device),
                torch.empty(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_layers)
        ]

    def place(self, batch: PackedBatch) -> Placement:
        """Make room for the rows of `batch`, whose texts are the active ones.

        Raises ValueError if a text has no room left.
        """
        added, needed = batch.lengths, batch.needed
        first = self.starts[self.active] + self.lengths[self.active]
        if (first + added > self.starts[self.active + 1]).any():
            raise ValueError("a text has more tokens than its cache has room for")
        within = np.arange(added.sum()) - np.repeat(added.cumsum() - added, added)
        rows = np.repeat(first, added) + within
        self.lengths[self.active] += added

        used = np.zeros_like(self.lengths)
        used[self.active] = self.lengths[self.active]
        slack = np.diff(self.starts) - used
        queries, wanted = np.zeros_like(used), np.zeros_like(used)
        queries[self.active], wanted[self.active] = added, needed
        if slack.any():
            zero = np.zeros_like(used)
            queries, wanted, used = (
                np.stack(pair, axis=1).ravel()
                for pair in ((queries, zero), (wanted, zero), (used, slack))
            )
        return Placement(on_device(rows, self.device), *map(self._offsets, (queries, wanted, used)))

    def _offsets(self, counts: np.ndarray) -> Tensor:
        offsets = np.concatenate(([0], counts.cumsum())).astype(np.int32)
        return on_device(offsets, self.device)

    def extend(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v [T, KV, D] at `rows` [n] of a layer (rows of k beyond n are filler)."""
        pair = self.layers[layer]
        new = (k[: len(rows)], v[: len(rows)])
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            pair = (pair[0].index_copy(0, rows, new[0]), pair[1].index_copy(0, rows, new[1]))
            self.layers[layer] = pair
        else:
            for buffer, values in zip(pair, new, strict=True):
                buffer.index_copy_(0, rows, values)
        return pair

    def keep(self, texts: np.ndarray) -> None:
        """Go on with these of the active texts only; what the others hold is no longer read."""
        self.active = self.active[texts]
