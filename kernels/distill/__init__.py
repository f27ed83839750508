"""The training losses: reconstruction through a frozen head, and alignment with a teacher."""

from .op import ALIGNMENT, ALIGNMENTS, OP, alignment, distill, reconstruction

__all__ = ["ALIGNMENT", "ALIGNMENTS", "OP", "alignment", "distill", "reconstruction"]
