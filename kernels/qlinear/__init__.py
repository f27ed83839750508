"""Rows of activations quantised for a product with frozen quantised weights."""

from .op import OP, check_format, cpp_supports, fake_quantized, quantize_rows

__all__ = ["OP", "check_format", "cpp_supports", "fake_quantized", "quantize_rows"]
