"""Packing texts into batches without padding."""

from collections.abc import Iterator, Sequence
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
        starts = cumulative(lengths)
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - prefix_length, lengths)
        counts = lengths if needed is None else np.asarray(needed, dtype=np.int64)
        if (counts > lengths).any() or (counts < 0).any():
            raise ValueError("a text cannot have more needed rows than tokens")
        if blocks is not None:
            blocks = np.asarray(blocks, dtype=np.int32).reshape(-1, 2)
            if len(blocks) != len(lengths):
                raise ValueError(f"{len(blocks)} special blocks for {len(lengths)} texts")
        ids = np.concatenate(sequences) if len(sequences) else np.empty(0)
        cu_seqlens = on_device(starts.astype(np.int32), device)
        rows = NeededRows(counts, cu_seqlens, None)
        if (counts != lengths).any():
            ends = cumulative(counts)
            indices = np.arange(ends[-1]) + np.repeat(starts[1:] - ends[1:], counts)
            rows = NeededRows(
                counts, on_device(ends.astype(np.int32), device), on_device(indices, device)
            )
        return cls(
            ids=on_device(ids.astype(np.int64), device),
            positions=on_device(positions, device),
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            needed=rows,
            blocks=blocks,
        )


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
