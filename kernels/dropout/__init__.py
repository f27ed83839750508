"""Dropout whose choice follows from where an element stands."""

from .op import OP, check_rows, dropout

__all__ = ["OP", "check_rows", "dropout"]
