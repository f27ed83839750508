"""Dropout whose choice follows from where an element stands."""

from .op import OP, dropout

__all__ = ["OP", "dropout"]
