"""Final norm, mean over each text's rows, projection and L2 normalisation."""

from .op import BACKWARD, OP, pool

__all__ = ["BACKWARD", "OP", "pool"]
