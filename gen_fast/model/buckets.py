"""Small batches padded to few shapes, so that what has been recorded for one fits the next.

Padding changes nothing for the texts: padding texts are texts of their own, whose results are
dropped, and padding rows belong to no text, see the op `attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from gen_fast.model.batch import packed_arrays

# Batches of more tokens than this are not padded: there the GPU has more to do than Python.
# (Not measured: an estimate of 10 µs a launch and half of an H100's peak for a 0.6B model.)
MOST_ROWS = 2048


@dataclass(frozen=True)
class Bucket:
    """A shape of batches: rows, texts, and pooled rows, of which None means all."""

    rows: int
    texts: int
    needed: int | None

    @classmethod
    def of(cls, lengths: np.ndarray, needed: np.ndarray) -> Self:
        """The smallest bucket for texts of these lengths [B] and numbers of needed rows [B]."""
        texts = next_power_of_two(len(lengths))
        # Like special tokens, as many of each text: else there may be as many as rows.
        alike = bool((needed == needed[0]).all())
        every = bool((needed == lengths).all())
        length = int(needed[0]) if alike and not every else 1
        rows = bucket_rows(int(lengths.sum()) + length * (texts - len(lengths)))
        return cls(rows, texts, None if every else texts * length if alike else rows)

    def with_padding_texts(
        self, sequences: Sequence[np.ndarray], needed: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The texts and their needed rows, and padding texts, of which all rows are needed."""
        count = self.texts - len(sequences)
        alike = self.needed not in (None, self.rows)
        length = int(needed[0]) if alike else 1
        padding = [np.zeros(length, dtype=np.int64)] * count
        return [*sequences, *padding], np.concatenate((needed, np.full(count, length)))

    def arrays(
        self, sequences: Sequence[np.ndarray], needed: np.ndarray, prefix_length: int
    ) -> dict[str, np.ndarray]:
        """Fields of a DeviceBatch by name: `with_padding_texts`, and padding rows behind them."""
        arrays = packed_arrays(sequences, needed, prefix_length)
        for name, rows in (("ids", self.rows), ("positions", self.rows), ("needed", self.needed)):
            if rows is not None:
                arrays[name] = padded(arrays[name], rows)
        return arrays


def padded(values: np.ndarray, rows: int) -> np.ndarray:
    """values [n] or [n, …], and zeros behind them: [rows] or [rows, …]."""
    result = np.zeros((rows, *values.shape[1:]), dtype=values.dtype)
    result[: len(values)] = values
    return result


def bucket_rows(rows: int) -> int:
    """The next multiple of 16, beyond 128 of an eighth of the next power of two."""
    step = max(16, next_power_of_two(rows) // 8)
    return -(-rows // step) * step


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number from 1 on."""
    return 1 << (number - 1).bit_length()
