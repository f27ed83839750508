"""Frozen linears with quantised weights, and rows of activations quantised for them."""

from .fp8 import dequantize_weight_fp8, fits_fp8, quantize_weight_fp8
from .fp8_op import FP8, fp8_linear
from .int4 import blocks_shape, dequantize_weight, fits, quantize_weight
from .int4_op import INT4, int4_linear, int4_linear_backward
from .int8 import fits_int8, int8_blocks_shape, quantize_weight_int8, unpack_int8
from .int8_op import INT8, WEIGHT, int8_linear, int8_weight
from .op import OP, check_format, cpp_supports, fake_quantized, quantize_rows
from .reference import ROTATED, rotate_rows

__all__ = [
    "FP8",
    "INT4",
    "INT8",
    "OP",
    "ROTATED",
    "WEIGHT",
    "blocks_shape",
    "check_format",
    "cpp_supports",
    "dequantize_weight",
    "dequantize_weight_fp8",
    "fake_quantized",
    "fits",
    "fits_fp8",
    "fits_int8",
    "fp8_linear",
    "int4_linear",
    "int4_linear_backward",
    "int8_blocks_shape",
    "int8_linear",
    "int8_weight",
    "quantize_rows",
    "quantize_weight",
    "quantize_weight_fp8",
    "quantize_weight_int8",
    "rotate_rows",
    "unpack_int8",
]
