"""Weights of 8 bits in e4m3, with a scale for each output, in plain torch.

w ≈ q · scale. Layout: q [out, in] as it is, row by row: seen as [in, out] by columns, which is what
the tensor cores' product takes.
"""

from torch import Tensor

from .reference import dequantize_rows, quantize_rows

# Of both sides of a weight: torch's product takes no other.
MULTIPLE = 16


def fits_fp8(shape: tuple[int, ...]) -> bool:
    """Whether torch multiplies by a weight [out, in] in fp8."""
    return len(shape) == 2 and shape[0] % MULTIPLE == 0 and shape[1] % MULTIPLE == 0


def quantize_weight_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q [out, in] float8_e4m3fn and scales [out] float32 of a weight [out, in].

    Each output is quantised as `quantize_rows` does it, in plain torch on every device.
    """
    return quantize_rows(weight, "fp8")


def dequantize_weight_fp8(q: Tensor, scale: Tensor) -> Tensor:
    """The weight [out, in] of `q` and its scales: float32."""
    return dequantize_rows(q, scale)
