"""The gated activation of the feed-forward block."""

from .op import OP, swiglu

__all__ = ["OP", "swiglu"]
