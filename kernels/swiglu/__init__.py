"""The gated activation of the feed-forward block."""

from .op import BACKWARD, OP, QUANTIZED, swiglu, swiglu_quantized

__all__ = ["BACKWARD", "OP", "QUANTIZED", "swiglu", "swiglu_quantized"]
