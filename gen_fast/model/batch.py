"""Packing texts into batches without padding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class NeededRows:
    """The last rows of each text, whose states the caller wants: R in all.

    counts [B]: how many of each text, on the host. cu_seqlens [B + 1]: int32; rows
    cu_seqlens[i]:cu_seqlens[i+1] of the result are text i's. indices [R]: int64 rows of the batch;
    None means all of them.
    """

    counts: np.ndarray
    cu_seqlens: Tensor
    indices: Tensor | None


@dataclass(frozen=True)
class DeviceBatch:
    """What a pass reads of a batch, all of it on the device: its values may change, not its shapes.

    ids, positions [T]: int64. needed [R]: int64 rows whose states are wanted; None is all.
    cu_seqlens, cu_needed, cu_keys [N + 1]: int32, as attention takes them: of all rows, of the
    needed ones and of the keys. blocks [N, 2]: int32; None without a GEM mask. cache_rows [T]:
    int64, where each row goes in a KV cache; None without one. Rows beyond the last of a cu_seqlens
    are padding. longest: no position is beyond it, a shared prefix not counted.
    """

    ids: Tensor
    positions: Tensor
    needed: Tensor | None
    cu_seqlens: Tensor
    cu_needed: Tensor
    cu_keys: Tensor
    blocks: Tensor | None
    cache_rows: Tensor | None
    longest: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], longest: int) -> "DeviceBatch":
        """From tensors named like the fields. Without others, all rows are needed, and are keys."""
        cu_seqlens = tensors["cu_seqlens"]
        return cls(
            tensors["ids"],
            tensors["positions"],
            tensors.get("needed"),
            cu_seqlens,
            tensors.get("cu_needed", cu_seqlens),
            tensors.get("cu_keys", cu_seqlens),
            tensors.get("blocks"),
            tensors.get("cache_rows"),
            longest,
        )


@dataclass(frozen=True)
class PackedBatch:
    """Texts laid end to end, each behind the same (possibly empty) shared prefix.

    ids [T]: int64 token ids; V + j means special token j (see the op `append`).
    positions [T]: int64 position of each row in its own sequence, counting the prefix.
    cu_seqlens [B + 1]: int32; rows cu_seqlens[i]:cu_seqlens[i+1] belong to text i.
    lengths [B]: tokens of each text, on the host.
    blocks [B, 2]: int32, on the host; for the GEM mask the special block of each text, (first,
    after) in positions among its own tokens, those in a cache counted. None for other masks.
    """

    ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: np.ndarray
    needed: NeededRows
    blocks: np.ndarray | None = None

    @classmethod
    def pack(
        cls,
        sequences: Sequence[np.ndarray],
        *,
        needed: Sequence[int] | np.ndarray | None = None,
        prefix_length: int | np.ndarray = 0,
        blocks: Sequence[tuple[int, int]] | np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> "PackedBatch":
        """Pack 1-D id arrays. `needed[i]` is how many last rows of text i the caller wants.

        prefix_length: tokens that stand before each text, the same number for all or [B].
        blocks: (first, after) of each text, see AttentionOptions; (0, 0) is none where no prefix is
        shared. Raises ValueError if a text needs more rows than it has, or there is not a block
        for each text.
        """
        lengths = np.array([len(s) for s in sequences], dtype=np.int64)
        counts = lengths if needed is None else np.asarray(needed, dtype=np.int64)
        arrays = packed_arrays(sequences, counts, prefix_length)
        if blocks is not None:
            blocks = np.asarray(blocks, dtype=np.int32).reshape(-1, 2)
            if len(blocks) != len(lengths):
                raise ValueError(f"{len(blocks)} special blocks for {len(lengths)} texts")
        tensors = {name: on_device(values, device) for name, values in arrays.items()}
        cu_seqlens = tensors["cu_seqlens"]
        return cls(
            ids=tensors["ids"],
            positions=tensors["positions"],
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            needed=NeededRows(counts, tensors.get("cu_needed", cu_seqlens), tensors.get("needed")),
            blocks=blocks,
        )

    def device_batch(self) -> DeviceBatch:
        """What a pass without a cache reads of it."""
        return DeviceBatch(
            ids=self.ids,
            positions=self.positions,
            needed=self.needed.indices,
            cu_seqlens=self.cu_seqlens,
            cu_needed=self.needed.cu_seqlens,
            cu_keys=self.cu_seqlens,
            blocks=None if self.blocks is None else on_device(self.blocks, self.ids.device),
            cache_rows=None,
            # It bounds the length of every text without asking the device for the maximum.
            longest=len(self.ids),
        )


def packed_arrays(
    sequences: Sequence[np.ndarray], counts: np.ndarray, prefix_length: int | np.ndarray
) -> dict[str, np.ndarray]:
    """Fields of a DeviceBatch by name; `needed` and `cu_needed` only if not all rows are needed.

    counts [B]: needed rows of each text. prefix_length: see PackedBatch.pack. Raises ValueError if
    a text needs more rows than it has.
    """
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    if (counts > lengths).any() or (counts < 0).any():
        raise ValueError("a text cannot have more needed rows than tokens")
    starts = cumulative(lengths)
    ids = np.concatenate(sequences) if len(sequences) else np.empty(0)
    arrays = {
        "ids": ids.astype(np.int64),
        "positions": np.arange(starts[-1]) - np.repeat(starts[:-1] - prefix_length, lengths),
        "cu_seqlens": starts.astype(np.int32),
    }
    if (counts != lengths).any():
        ends = cumulative(counts)
        arrays["needed"] = np.arange(ends[-1]) + np.repeat(starts[1:] - ends[1:], counts)
        arrays["cu_needed"] = ends.astype(np.int32)
    return arrays


def cumulative(counts: np.ndarray) -> np.ndarray:
    """[B] counts to the [B + 1] bounds of consecutive runs."""
    return np.concatenate(([0], counts.cumsum()))


def on_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    """`values` as a tensor on `device`, without waiting for what a GPU has been given to do."""
    tensor = torch.from_numpy(values)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    with torch.cuda.device(device):  # pinning opens a context on the current GPU
        return tensor.pin_memory().to(device, non_blocking=True)


def split_by_budget(
    lengths: Sequence[int] | np.ndarray, budget: int, texts: int | None = None
) -> Iterator[slice]:
    """Cut consecutive texts into runs of at most `budget` tokens, at least one text each.

    texts: in a run, at most.
    """
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and (total + length > budget or i - start == texts):
            yield slice(start, i)
            start, total = i, 0
        total += length
    if start < len(lengths):
        yield slice(start, len(lengths))
