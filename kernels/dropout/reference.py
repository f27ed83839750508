"""Dropout of rows in plain torch, any float dtype."""

import torch
from torch import Tensor

from .philox import ROWS, kept


def dropout(
    x: Tensor, text_keys: Tensor, positions: Tensor, p: float, seed: int, stream: int
) -> Tensor:
    """x / (1 - p) where an element is kept, else 0. See `op.dropout`."""
    c2 = torch.tensor(ROWS + stream, device=x.device)
    keep = kept(seed, p, x.shape[1], positions, c2, text_keys.long())
    return torch.where(keep, x * (1 / (1 - p)), 0)
