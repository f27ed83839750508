"""Frozen linears with quantised weights, and rows of activations quantised for them."""

from .fp8 import dequantize_weight_fp8, fits_fp8, quantize_weight_fp8
from .fp8_op import FP8, fp8_linear
from .groups import dequantize_groups, fits_groups, group_blocks_shape, quantize_groups
from .groups_op import INT4, INT8_GROUP, group_linear, group_linear_backward
from .int8 import fits_int8, int8_blocks_shape, quantize_weight_int8, unpack_int8
from .int8_op import INT8, WEIGHT, int8_linear, int8_weight
from .op import OP, check_format, cpp_supports, fake_quantized, quantize_rows
from .reference import ROTATED, Epilogue, rotate_rows

__all__ = [
    "FP8",
    "INT4",
    "INT8",
    "INT8_GROUP",
    "OP",
    "ROTATED",
    "WEIGHT",
    "Epilogue",
    "check_format",
    "cpp_supports",
    "dequantize_groups",
    "dequantize_weight_fp8",
    "fake_quantized",
    "fits_fp8",
    "fits_groups",
    "fits_int8",
    "fp8_linear",
    "group_blocks_shape",
    "group_linear",
    "group_linear_backward",
    "int8_blocks_shape",
    "int8_linear",
    "int8_weight",
    "quantize_groups",
    "quantize_rows",
    "quantize_weight_fp8",
    "quantize_weight_int8",
    "rotate_rows",
    "unpack_int8",
]
