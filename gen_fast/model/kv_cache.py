"""Keys and values of the texts of a batch, for tokens that follow them in a later pass.

Decoding adds a token a pass; training runs the special tokens, with gradient, after queries that
were run without. Attention finds a text's keys by offsets, so the unused end of a text's region is
given to attention as one more text, without queries.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.batch import DeviceBatch, PackedBatch, cumulative, on_device
from gen_fast.model.config import BackboneConfig


class KVCache:
    """Keys (after RoPE) and values of B texts; text i has room for `capacities[i]` tokens.

    layers: a [sum of capacities, KV, D] pair a layer. lengths [B]: tokens held. active: the texts
    that the next batch continues, all at first. A length that is set to 0 gives the text's room to
    another. Under autograd `extend` makes new buffers, so that gradients reach the keys and values
    that it was given. padding_row: a row of the layers that no text reads, where padding rows go.
    """

    def __init__(
        self,
        config: BackboneConfig,
        capacities: Sequence[int] | np.ndarray,
        *,
        padding_rows: int = 0,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.starts = np.concatenate(([0], np.cumsum(capacities, dtype=np.int64)))
        self.lengths = np.zeros(len(capacities), dtype=np.int64)
        self.active = np.arange(len(capacities))
        self.device = torch.device(device)
        self.padding_row = int(self.starts[-1])
        shape = (self.padding_row + padding_rows, config.num_kv_heads, config.head_dim)
        self.layers = [
            (
                torch.empty(shape, dtype=dtype, device=device),
                torch.empty(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_layers)
        ]

    def place(self, batch: PackedBatch) -> DeviceBatch:
        """Make room for the rows of `batch`, whose texts are the active ones.

        Returns what a pass reads of the batch and of the cache afterwards. Regions with unused rows
        count as two texts, the second without queries. Raises ValueError if a text has no room.
        """
        arrays = self.place_rows(batch.lengths, batch.needed.counts, batch.blocks)
        tensors = {name: on_device(values, self.device) for name, values in arrays.items()}
        return DeviceBatch(
            ids=batch.ids,
            positions=batch.positions,
            needed=batch.needed.indices,
            longest=int(self.lengths.max(initial=0)),
            blocks=tensors.pop("blocks", None),
            **tensors,
        )

    def place_rows(
        self,
        added: np.ndarray,
        needed: np.ndarray,
        blocks: np.ndarray | None,
        *,
        as_two: bool = False,
    ) -> dict[str, np.ndarray]:
        """`place` for texts of `added` rows, of which `needed` are needed, on the host.

        Returns cache_rows, cu_seqlens, cu_needed, cu_keys and, where there are some, blocks.
        as_two: regions count as two texts even if all of them are full, so that shapes stay.
        """
        first = self.starts[self.active] + self.lengths[self.active]
        if (first + added > self.starts[self.active + 1]).any():
            raise ValueError("a text has more tokens than its cache has room for")
        within = np.arange(added.sum()) - np.repeat(added.cumsum() - added, added)
        rows = np.repeat(first, added) + within
        self.lengths[self.active] += added

        queries, needed, keys = (self._of_all(x) for x in (added, needed, self.held))
        all_blocks = None
        if blocks is not None:
            all_blocks = np.zeros((len(self.lengths), 2), dtype=np.int32)
            all_blocks[self.active] = blocks
        unused = np.diff(self.starts) - keys
        if as_two or unused.any():
            # Each region becomes two texts: what is held, and the rest without queries.
            queries, needed, keys = (
                np.stack((held, rest), axis=1).ravel()
                for held, rest in ((queries, 0 * queries), (needed, 0 * needed), (keys, unused))
            )
            if all_blocks is not None:
                all_blocks = np.stack((all_blocks, 0 * all_blocks), axis=1).reshape(-1, 2)
        arrays = {
            "cache_rows": rows,
            "cu_seqlens": cumulative(queries).astype(np.int32),
            "cu_needed": cumulative(needed).astype(np.int32),
            "cu_keys": cumulative(keys).astype(np.int32),
        }
        return arrays if all_blocks is None else {**arrays, "blocks": all_blocks}

    @property
    def held(self) -> np.ndarray:
        """Tokens held of each active text."""
        return self.lengths[self.active]

    def _of_all(self, counts: np.ndarray) -> np.ndarray:
        """Counts of the active texts as counts of all [B]; the others have 0."""
        everyone = np.zeros_like(self.lengths)
        everyone[self.active] = counts
        return everyone

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
