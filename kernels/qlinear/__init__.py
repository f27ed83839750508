"""Frozen linears with quantised weights, and rows of activations quantised for them."""

from .int4 import blocks_shape, dequantize_weight, fits, quantize_weight
from .int4_op import INT4, int4_linear, int4_linear_backward
from .op import OP, check_format, cpp_supports, fake_quantized, quantize_rows

__all__ = [
    "INT4",
    "OP",
    "blocks_shape",
    "check_format",
    "cpp_supports",
    "dequantize_weight",
    "fake_quantized",
    "fits",
    "int4_linear",
    "int4_linear_backward",
    "quantize_rows",
    "quantize_weight",
]
