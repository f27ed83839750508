"""The way down to LoRA's rank, over inputs that dropout has thinned."""

from .op import BACKWARD, OP, lora_down, lora_down_backward

__all__ = ["BACKWARD", "OP", "lora_down", "lora_down_backward"]
