"""The weights of a backbone's linears in training, in place of its frozen ones.

Embedding, norms, biases and head stay the backbone's, which keeps its own linears as they were: a
pass without the update is the base.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gen_fast.model.config import BackboneConfig
from gen_fast.model.dropout import RowDropout
from gen_fast.model.lora import MATRICES, linear_sizes
from gen_fast.model.update import FrozenLinear
from gen_fast.ops.dense import product


class FullWeights(nn.Module):
    """Every linear of a backbone of these sizes: float32, trainable, an Update.

    matrices: one parameter [out, in] a matrix of LayerWeights (queries, keys and values are one,
    and so are gate and up), layer by layer in the order of MATRICES. Their values are those that
    `copy` brings.
    """

    dropout = 0.0

    def __init__(self, backbone: BackboneConfig, *, device: Any = "cpu") -> None:
        super().__init__()
        self._sizes = linear_sizes(backbone)
        self._parts = {
            (layer, matrix): tuple(f"layers.{layer}.{part}" for part in parts)
            for layer in range(backbone.num_layers)
            for matrix, parts in MATRICES.items()
        }
        self.matrices = nn.ParameterList()
        for names in self._parts.values():
            rows = sum(self._sizes[name][0] for name in names)
            matrix = torch.empty(rows, self._sizes[names[0]][1], device=device)
            self.matrices.append(nn.Parameter(matrix))
        self._cast: _CastWeights | None = None

    def weights(self) -> dict[str, Tensor]:
        """[out, in] of every linear by name, such as "layers.3.mlp.up_proj": views, no gradient."""
        weights: dict[str, Tensor] = {}
        for names, matrix in zip(self._parts.values(), self.matrices, strict=True):
            rows = [self._sizes[name][0] for name in names]
            weights |= zip(names, matrix.detach().split(rows), strict=True)
        return weights

    @torch.no_grad()
    def copy(self, read: Callable[[str, tuple[int, ...]], Tensor]) -> None:
        """Take over weights, one at a time. read: gives that of a name and shape [out, in]."""
        for name, own in self.weights().items():
            own.copy_(read(name, tuple(own.shape)))

    def cast(self, dtype: torch.dtype) -> "_CastWeights":
        """See Update. Passes share one copy until the weights change; in float32 there is none."""
        # Graphs that wait for their backward pass would each hold one otherwise.
        versions = [matrix._version for matrix in self.matrices]
        if self._cast is None or (self._cast.dtype, self._cast.versions) != (dtype, versions):
            self._cast = None  # before the next is made: one at a time
            matrices = dict(zip(self._parts, self.matrices, strict=True))
            self._cast = _CastWeights(matrices, dtype, versions)
        return self._cast


class _CastWeights:
    """The weights in the dtype of a pass. versions: of the parameters that they were cast from."""

    def __init__(
        self,
        matrices: Mapping[tuple[int, str], nn.Parameter],
        dtype: torch.dtype,
        versions: Sequence[int],
    ) -> None:
        self.dtype, self.versions = dtype, versions
        self._weights = {
            key: (parameter, parameter.detach().to(dtype)) for key, parameter in matrices.items()
        }

    def linear(self, x: Tensor, frozen: FrozenLinear, drop: RowDropout | None = None) -> Tensor:
        """See CastUpdate. The frozen weight is not read, and nothing is dropped."""
        result: Tensor = _FullLinear.apply(x, frozen.bias, *self._weights[frozen.key])  # type: ignore[no-untyped-call]
        return result


class _FullLinear(torch.autograd.Function):
    """y = x·Wᵀ + b, dW = dyᵀ·x. Saves x alone: W is there anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, parameter: Tensor, weight: Tensor
    ) -> Tensor:
        """parameter: for its gradient; weight: the same in x's dtype."""
        # Through save_for_backward, which refuses a weight that has been changed since.
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        dw = product(grad.T, x.T).to(torch.promote_types(x.dtype, torch.float32))
        return dx, None, dw, None
