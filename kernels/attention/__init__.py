"""Packed attention over a shared prefix and each text's own tokens."""

from .op import BACKWARD, MASKS, OP, attention

__all__ = ["BACKWARD", "MASKS", "OP", "attention"]
