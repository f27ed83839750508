"""LoRA's down projection in plain torch: dropout and a product for each part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_fast.ops.dropout import reference

Dropout = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Dropped:
    """What is dropped of x for each part: `dropout`'s arguments, but a stream a part."""

    text_keys: Tensor
    """[T] int32 or int64: a number of each row's text."""
    positions: Tensor
    """[T] int64: where the row stands in its text."""
    p: float
    seed: int
    streams: Sequence[int]
    """[parts]: each part's own."""

    @property
    def where(self) -> tuple[Tensor, Tensor, float, int]:
        """What all parts have in common, as dropout takes it."""
        return self.text_keys, self.positions, self.p, self.seed


def lora_down(
    x: Tensor, a: Tensor, dropped: Dropped, *, dropout: Dropout = reference.dropout
) -> Tensor:
    """See `op.lora_down`. dropout: what drops."""
    streams = dropped.streams
    parts = a.split(len(a) // len(streams))
    return torch.cat(
        [dropout(x, *dropped.where, s) @ part.T for s, part in zip(streams, parts, strict=True)], 1
    )


def lora_down_backward(
    grad: Tensor, x: Tensor, a: Tensor, dropped: Dropped, *, dropout: Dropout = reference.dropout
) -> tuple[Tensor, Tensor]:
    """See `op.lora_down_backward`. dropout: what drops."""
    streams, where = dropped.streams, dropped.where
    rank = len(a) // len(streams)
    dx, da = torch.zeros_like(x), []
    for stream, part, up in zip(streams, a.split(rank), grad.split(rank, 1), strict=True):
        dx += dropout(up @ part, *where, stream)
        da.append(up.T @ dropout(x, *where, stream))
    return dx, torch.cat(da).to(wide(a.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the gradient of A is given in."""
    return torch.promote_types(dtype, torch.float32)
