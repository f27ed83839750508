"""RMSNorm, alone or after a residual add, with or without quantised rows."""

from .op import BACKWARD, OP, QUANTIZED, add_rms_norm, add_rms_norm_quantized, rms_norm

__all__ = ["BACKWARD", "OP", "QUANTIZED", "add_rms_norm", "add_rms_norm_quantized", "rms_norm"]
