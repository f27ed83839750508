"""The way down to LoRA's rank, over inputs that dropout has thinned."""

from .op import BACKWARD, OP, lora_down, lora_down_backward
from .reference import Dropped

__all__ = ["BACKWARD", "OP", "Dropped", "lora_down", "lora_down_backward"]
