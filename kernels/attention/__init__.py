"""Packed attention over a shared prefix and each text's own tokens."""

from .op import OP, attention

__all__ = ["OP", "attention"]
