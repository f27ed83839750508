"""What tests ask of LoRA's factors."""

import torch

from gen_fast.model.config import BackboneConfig
from gen_fast.model.lora import Factors, Lora


def gradients_of(lora: Lora, backbone: BackboneConfig) -> dict[str, Factors]:
    """Those of A and B by the name of their linear, as PEFT has them."""
    holder = Lora(lora.config, backbone)
    with torch.no_grad():
        for target, parameter in zip(holder.parameters(), lora.parameters(), strict=True):
            target.copy_(parameter.grad)
    return holder.factors()
