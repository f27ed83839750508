"""RMSNorm, alone or after a residual add."""

from .op import OP, add_rms_norm, rms_norm

__all__ = ["OP", "add_rms_norm", "rms_norm"]
