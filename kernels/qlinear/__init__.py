"""Rows of activations quantised for a product with frozen quantised weights."""

from .op import OP, fake_quantized, quantize_rows

__all__ = ["OP", "fake_quantized", "quantize_rows"]
