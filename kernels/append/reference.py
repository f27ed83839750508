"""Gather from the vocabulary and the special tokens, in plain torch."""

import torch
from torch import Tensor


def append(table: Tensor, special: Tensor | None, ids: Tensor) -> Tensor:
    """Rows of `table` [V, h] for ids below V, rows of `special` [k, h] for ids V, V+1, … ."""
    vocabulary = table.shape[0]
    if special is None:
        return torch.nn.functional.embedding(ids, table)
    rows = torch.nn.functional.embedding(ids.clamp(max=vocabulary - 1), table)
    is_special = ids >= vocabulary
    return rows.masked_scatter(
        is_special.unsqueeze(-1), special.to(table.dtype)[ids[is_special] - vocabulary]
    )


def append_backward(grad: Tensor, ids: Tensor, vocabulary: int, special: int) -> Tensor:
    """Gradient [k, h] of the special rows, summed in float32 at least."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    is_special = ids >= vocabulary
    total = torch.zeros(special, grad.shape[1], dtype=dtype, device=grad.device)
    return total.index_add(0, ids[is_special] - vocabulary, grad[is_special].to(dtype))
