"""Token embedding from two tables: the frozen vocabulary and the trained special tokens."""

from .op import OP, append

__all__ = ["OP", "append"]
