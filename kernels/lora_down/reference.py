"""LoRA's down projection in plain torch: dropout and a product for each part."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gen_fast.ops.dropout import reference

Dropout = Callable[..., Tensor]


def lora_down(
    x: Tensor,
    a: Tensor,
    text_keys: Tensor,
    positions: Tensor,
    p: float,
    seed: int,
    streams: Sequence[int],
    *,
    dropout: Dropout = reference.dropout,
) -> Tensor:
    """See `op.lora_down`. dropout: what drops."""
    parts = a.split(len(a) // len(streams))
    where = (text_keys, positions, p, seed)
    return torch.cat(
        [dropout(x, *where, s) @ part.T for s, part in zip(streams, parts, strict=True)], 1
    )


def lora_down_backward(
    grad: Tensor,
    x: Tensor,
    a: Tensor,
    text_keys: Tensor,
    positions: Tensor,
    p: float,
    seed: int,
    streams: Sequence[int],
    *,
    dropout: Dropout = reference.dropout,
) -> tuple[Tensor, Tensor]:
    """See `op.lora_down_backward`. dropout: what drops."""
    rank = len(a) // len(streams)
    where = (text_keys, positions, p, seed)
    dx, da = torch.zeros_like(x), []
    for stream, part, up in zip(streams, a.split(rank), grad.split(rank, 1), strict=True):
        dx += dropout(up @ part, *where, stream)
        da.append(up.T @ dropout(x, *where, stream))
    return dx, torch.cat(da).to(wide(a.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the gradient of A is given in."""
    return torch.promote_types(dtype, torch.float32)
