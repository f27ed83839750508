"""Final norm, mean over each text's rows, projection and L2 normalisation."""

from .op import OP, pool

__all__ = ["OP", "pool"]
