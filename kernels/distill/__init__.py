"""The training losses: reconstruction through a frozen head, and alignment with a teacher."""

from .op import ALIGNMENTS, OP, distill

__all__ = ["ALIGNMENTS", "OP", "distill"]
