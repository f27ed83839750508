"""Packing texts into batches without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Texts laid end to end, each behind the same (possibly empty) shared prefix.

    ids [T]: int64 token ids; V + j means special token j (see the op `append`).
    offsets [B + 1]: int32; rows offsets[i]:offsets[i+1] belong to text i.
    positions [T]: int64 position of each row in its own sequence, counting the prefix.
    row_offsets [B + 1]: int32; how the needed rows are split over the texts.
    lengths, needed [B]: tokens and needed rows of each text, on the host.
    rows [R]: int64 indices of the needed rows, the last ones of each text; None means all.
    Rows beyond the offsets, and needed rows beyond row_offsets, are padding: see `filler` of
    `pack`.
    """

    ids: Tensor
    offsets: Tensor
    positions: Tensor
    row_offsets: Tensor
    rows: Tensor | None
    lengths: np.ndarray
    needed: np.ndarray

    @classmethod
    def pack(
        cls,
        sequences: Sequence[np.ndarray],
        *,
        needed: Sequence[int] | None = None,
        prefix_length: int | np.ndarray = 0,
        filler: bool = False,
        device: torch.device | str = "cpu",
    ) -> "PackedBatch":
        """Pack 1-D id arrays. `needed[i]` is how many last rows of text i the caller wants.

        prefix_length: tokens that stand before each text, the same number for all or [B].
        filler: add rows of no text until their number is one of a few: oneDNN prepares, and
        keeps, each of its products once for every number of rows that it meets.
        Raises ValueError if a text needs more rows than it has.
        """
        lengths = np.array([len(s) for s in sequences], dtype=np.int64)
        offsets = np.concatenate(([0], lengths.cumsum()))
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - prefix_length, lengths)
        counts = lengths if needed is None else np.asarray(needed, dtype=np.int64)
        if (counts > lengths).any() or (counts < 0).any():
            raise ValueError("a text cannot have more needed rows than tokens")
        row_offsets = np.concatenate(([0], counts.cumsum()))
        rows = None
        if filler or (counts != lengths).any():
            starts = np.repeat(offsets[1:] - counts - row_offsets[:-1], counts)
            rows = np.arange(row_offsets[-1]) + starts
        ids = np.concatenate(sequences) if len(sequences) else np.empty(0)
        if filler:
            ids, positions, rows = map(_with_filler, (ids, positions, rows))

        return cls(
            ids=on_device(ids.astype(np.int64), device),
            offsets=on_device(offsets.astype(np.int32), device),
            positions=on_device(positions, device),
            row_offsets=on_device(row_offsets.astype(np.int32), device),
            rows=None if rows is None else on_device(rows, device),
            lengths=lengths,
            needed=counts,
        )


def on_device(values: np.ndarray, device: torch.device | str) -> Tensor:
    """`values` as a tensor on `device`, without waiting for what a GPU has been given to do."""
    tensor = torch.from_numpy(values)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    with torch.cuda.device(device):  # pinning opens a context on the current GPU
        return tensor.pin_memory().to(device, non_blocking=True)


def _with_filler(values: np.ndarray) -> np.ndarray:
    """`values` [n] followed by zeros, `rounded_up(n)` in all."""
    return np.pad(values, (0, rounded_up(len(values)) - len(values)))


def rounded_up(rows: int) -> int:
    """The next of 32 evenly spaced numbers in each power of two: at most 1/32 more rows."""
    step = 1 << max(0, rows.bit_length() - 6)
    return -(-rows // step) * step


def split_by_budget(lengths: Sequence[int], budget: int) -> Iterator[slice]:
    """Cut consecutive texts into runs of at most `budget` tokens, at least one text each."""
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > budget:
            yield slice(start, i)
            start, total = i, 0
        total += length
    if start < len(lengths):
        yield slice(start, len(lengths))
