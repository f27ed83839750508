"""Final norm, and mean over each text's rows."""

from .op import OP, pool

__all__ = ["OP", "pool"]
