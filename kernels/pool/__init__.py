"""Final norm, mean over each text's rows, and projection."""

from .op import OP, pool

__all__ = ["OP", "pool"]
