"""What tests ask of the updates of linears."""

import torch
from torch import Tensor

from gen_fast.model.config import BackboneConfig
from gen_fast.model.full import FullWeights
from gen_fast.model.lora import Factors, Lora


def gradients_of(lora: Lora, backbone: BackboneConfig) -> dict[str, Factors]:
    """Those of A and B by the name of their linear, as PEFT has them."""
    holder = Lora(lora.config, backbone)
    with torch.no_grad():
        for target, parameter in zip(holder.parameters(), lora.parameters(), strict=True):
            target.copy_(parameter.grad)
    return holder.factors()


def weight_gradients_of(full: FullWeights, backbone: BackboneConfig) -> dict[str, Tensor]:
    """Those of the weights by the name of their linear, as transformers has them."""
    holder = FullWeights(backbone)
    with torch.no_grad():
        for target, parameter in zip(holder.parameters(), full.parameters(), strict=True):
            target.copy_(parameter.grad)
    return holder.weights()
