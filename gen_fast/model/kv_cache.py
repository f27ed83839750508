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

from gen_fast.model.batch import PackedBatch, cumulative, on_device
from gen_fast.model.config import BackboneConfig


@dataclass(frozen=True)
class Placement:
    """Where the rows of a batch go in a cache, and how attention sees the cache afterwards.

    rows [T]: int64, buffer row of each row of the batch. cu_seqlens, cu_needed, cu_keys: int32, as
    attention takes them: of all rows of the batch, of its needed rows, and of the keys. Regions
    with unused rows count as two texts, the second without queries. blocks: int32 [texts, 2], the
    special blocks of these; None without a GEM mask.
    """

    rows: Tensor
    cu_seqlens: Tensor
    cu_needed: Tensor
    cu_keys: Tensor
    blocks: Tensor | None = None


class KVCache:
    """Keys (after RoPE) and values of B texts; text i has room for `capacities[i]` tokens.

    layers: a [sum of capacities, KV, D] pair a layer. lengths [B]: tokens held. active: the texts
    that the next batch continues, all at first. A length that is set to 0 gives the text's room to
    another. Under autograd `extend` makes new buffers, so that gradients reach the keys and values
    that it was given.
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
        added = batch.lengths
        first = self.starts[self.active] + self.lengths[self.active]
        if (first + added > self.starts[self.active + 1]).any():
            raise ValueError("a text has more tokens than its cache has room for")
        within = np.arange(added.sum()) - np.repeat(added.cumsum() - added, added)
        rows = np.repeat(first, added) + within
        self.lengths[self.active] += added

        queries, needed, keys = (self._of_all(x) for x in (added, batch.needed.counts, self.held))
        blocks = None
        if batch.blocks is not None:
            blocks = np.zeros((len(self.lengths), 2), dtype=np.int32)
            blocks[self.active] = batch.blocks
        unused = np.diff(self.starts) - keys
        if unused.any():
            # Each region becomes two texts: what is held, and the rest without queries.
            queries, needed, keys = (
                np.stack((held, rest), axis=1).ravel()
                for held, rest in ((queries, 0 * queries), (needed, 0 * needed), (keys, unused))
            )
            if blocks is not None:
                blocks = np.stack((blocks, 0 * blocks), axis=1).reshape(-1, 2)
        return Placement(
            rows=on_device(rows, self.device),
            cu_seqlens=self._cu_seqlens(queries),
            cu_needed=self._cu_seqlens(needed),
            cu_keys=self._cu_seqlens(keys),
            blocks=None if blocks is None else on_device(blocks, self.device),
        )

    @property
    def held(self) -> np.ndarray:
        """Tokens held of each active text."""
        return self.lengths[self.active]

    def _of_all(self, counts: np.ndarray) -> np.ndarray:
        """Counts of the active texts as counts of all [B]; the others have 0."""
        everyone = np.zeros_like(self.lengths)
        everyone[self.active] = counts
        return everyone

    def _cu_seqlens(self, counts: np.ndarray) -> Tensor:
        return on_device(cumulative(counts).astype(np.int32), self.device)

    def extend(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v [T, KV, D] at `rows` [T] of a layer; return all of the layer's."""
        keys, values = self.layers[layer]
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            keys, values = keys.index_copy(0, rows, k), values.index_copy(0, rows, v)
            self.layers[layer] = keys, values
        else:
            keys.index_copy_(0, rows, k)
            values.index_copy_(0, rows, v)
        return keys, values
