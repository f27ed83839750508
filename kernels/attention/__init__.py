"""Packed attention over a shared prefix and each text's own tokens."""

from .op import BACKWARD, OP, attention
from .options import AttentionOptions

__all__ = ["BACKWARD", "OP", "AttentionOptions", "attention"]
