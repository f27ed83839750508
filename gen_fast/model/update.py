"""What stands in for a backbone's frozen linears in a pass: LoRA, or weights in training.

Each kind is a module whose parameters are float32 masters. A pass takes it in its own dtype, and
asks that for each product.
"""

from typing import Protocol

import torch
from torch import Tensor

from gen_fast.model.dropout import RowDropout


class CastUpdate(Protocol):
    """An update in the dtype of a pass."""

    def linear(
        self,
        layer: int,
        matrix: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        drop: RowDropout | None = None,
    ) -> Tensor:
        """x [T, in] through a matrix of a layer as it is updated: [T, out].

        matrix: a name of gen_fast.model.lora.MATRICES. weight [out, in], plain or packed, and bias
        [out]: the frozen ones. drop: of what the update does with x. Gradients reach x and the
        update's parameters.
        """


class Update(Protocol):
    """An update of the linears of one backbone."""

    @property
    def dropout(self) -> float:
        """The share of their inputs that it drops in training."""

    def cast(self, dtype: torch.dtype) -> CastUpdate:
        """It as a pass in `dtype` multiplies by it, for as long as it does not change."""
