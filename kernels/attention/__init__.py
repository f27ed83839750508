"""Packed attention over a shared prefix and each text's own tokens."""

from .op import BACKWARD, OP, attention
from .options import MASKS, AttentionOptions

__all__ = ["BACKWARD", "MASKS", "OP", "AttentionOptions", "attention"]
