"""Products of rows and weights of 8 bits: what int8 and fp8 are to the tests of both."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gen_fast.ops import Op, qlinear


@dataclass(frozen=True)
class Product:
    """Rows times a weight, both in one format."""

    name: str  # of the format, as quantize_rows takes it
    op: Op
    function: Callable[..., Tensor]  # of rows, a weight and the epilogue
    quantize_weight: Callable[[Tensor], tuple[Tensor, Tensor]]
    matrix: Callable[[Tensor], Tensor]  # a quantised weight as [out, in]
    # What tests go over: dtypes of results, numbers of rows, (out, in) with the smallest first.
    dtypes: tuple[torch.dtype, ...]
    rows: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]

    def example(
        self,
        rows: int,
        shape: tuple[int, int],
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        biased: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """What `linear` takes: rows, their scales, a weight, scales of outputs, a bias or None."""
        torch.manual_seed(0)
        out, inputs = shape
        x = torch.randn(rows, inputs)
        if rows > 1:
            x[1] = 0  # a row whose scale is 0
        q, scale = qlinear.quantize_rows(x, self.name, impl="reference")
        weight, weight_scale = self.quantize_weight(torch.randn(shape) / inputs**0.5)
        bias = torch.randn(out).to(device, dtype) if biased else None
        return *(x.to(device) for x in (q, scale, weight, weight_scale)), bias

    def linear(
        self,
        q: Tensor,
        scale: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        impl: str | None = None,
    ) -> Tensor:
        """The product of an example, or of one with other parts."""
        epilogue = qlinear.Epilogue(scale, weight_scale, bias, dtype)
        return self.function(q, weight, epilogue, impl=impl)

    def exact(
        self,
        q: Tensor,
        scale: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """The product in float64."""
        wide = self.matrix(weight).double() * weight_scale.double().unsqueeze(1)
        y = q.double() * scale.double().unsqueeze(1) @ wide.T
        return y if bias is None else y + bias.double()


INT8 = Product(
    "int8",
    op=qlinear.INT8,
    function=qlinear.int8_linear,
    quantize_weight=qlinear.quantize_weight_int8,
    matrix=qlinear.unpack_int8,
    dtypes=(torch.float32, torch.bfloat16),
    rows=(0, 1, 5, 6, 13),
    # A block, odd numbers of blocks both ways, several tasks.
    shapes=((16, 4), (48, 100), (112, 576), (80, 1056)),
)
FP8 = Product(
    "fp8",
    op=qlinear.FP8,
    function=qlinear.fp8_linear,
    quantize_weight=qlinear.quantize_weight_fp8,
    matrix=lambda weight: weight,
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    rows=(0, 1, 5, 17, 300),
    # The smallest, odd multiples of 16, a layer's.
    shapes=((16, 16), (48, 80), (112, 576), (80, 1056)),
)
