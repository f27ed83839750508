"""Dropout of a training pass: what is dropped follows from numbers, not from a generator's state.

So a text that is run again drops the same elements, in whatever batch and however often: for
recomputation, for gradient caching, on another rank. See kernels/dropout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.batch import PackedBatch, on_device


@dataclass(frozen=True)
class Dropout:
    """What a pass drops.

    attention: share of attention's weights. text_keys: a number in [0, 2^32) for each text of the
    batch; what is dropped of a text follows from it, the seed in [0, 2^63), and the place. The
    share that LoRA drops is in its own settings.
    """

    seed: int
    text_keys: Sequence[int] | np.ndarray
    attention: float = 0.0


@dataclass(frozen=True)
class RowDropout:
    """Dropout of rows [T, N] that belong to texts: a share p of their elements.

    text_keys [T]: of each row's text. positions [T]: of the row in its text.
    """

    p: float
    seed: int
    text_keys: Tensor
    positions: Tensor

    @classmethod
    def of_batch(cls, p: float, dropout: Dropout, batch: PackedBatch) -> "RowDropout":
        """Of all rows of a batch without a prefix."""
        # As the op reads them: converted once, not in every linear.
        keys = np.repeat(np.asarray(dropout.text_keys), batch.lengths)
        keys = keys.astype(np.uint32).view(np.int32)
        return cls(p, dropout.seed, on_device(keys, batch.ids.device), batch.positions)

    def at(self, rows: Tensor) -> "RowDropout":
        """Of some rows of those."""
        return RowDropout(self.p, self.seed, self.text_keys[rows], self.positions[rows])

    def padded(self, rows: int) -> "RowDropout":
        """Of these rows, followed by padding rows up to `rows` in all."""
        more = 0, rows - len(self.positions)
        keys, positions = (
            torch.nn.functional.pad(x, more) for x in (self.text_keys, self.positions)
        )
        return RowDropout(self.p, self.seed, keys, positions)

    @property
    def settings(self) -> tuple[Tensor, Tensor, float, int]:
        """text_keys, positions, p and seed, as the ops take them."""
        return self.text_keys, self.positions, self.p, self.seed
