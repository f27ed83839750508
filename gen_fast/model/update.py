"""What stands in for a backbone's frozen linears in a pass: LoRA, or weights in training.

Each kind is a module whose parameters are float32 masters. A pass takes it in its own dtype, and
asks that for each product.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gen_fast.model.dropout import RowDropout


class FrozenLinear(NamedTuple):
    """A matrix of a backbone's layer. matrix: a name of gen_fast.model.lora.MATRICES.

    weight [out, in], plain or packed; bias [out].
    """

    layer: int
    matrix: str
    weight: Tensor
    bias: Tensor | None

    @property
    def key(self) -> tuple[int, str]:
        """Which matrix of which layer it is."""
        return self[:2]


class CastUpdate(Protocol):
    """An update in the dtype of a pass."""

    def linear(self, x: Tensor, frozen: FrozenLinear, drop: RowDropout | None = None) -> Tensor:
        """x [T, in] through a linear as it is updated: [T, out].

        drop: of what the update does with x. Gradients reach x and the update's parameters.
        """


class Update(Protocol):
    """An update of the linears of one backbone."""

    @property
    def dropout(self) -> float:
        """The share of their inputs that it drops in training."""

    def cast(self, dtype: torch.dtype) -> CastUpdate:
        """It as a pass in `dtype` multiplies by it, for as long as it does not change."""
