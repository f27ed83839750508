"""Token embedding from two tables: the frozen vocabulary and the trained special tokens."""

from .op import BACKWARD, OP, append

__all__ = ["BACKWARD", "OP", "append"]
