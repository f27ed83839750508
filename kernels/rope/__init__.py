"""Rotary position embedding, with Qwen3's per-head RMSNorm in the same pass."""

from .op import BACKWARD, OP, rope

__all__ = ["BACKWARD", "OP", "rope"]
