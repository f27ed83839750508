"""A tiny GEM model with factors and special tokens far from where they begin."""

import torch

from gen_fast.formats.gem import Settings, SpecialTokens, write_special
from gen_fast.formats.peft import write_adapter
from gen_fast.model.lora import Lora, LoraConfig
from gen_fast.model.weights import load_backbone


def save_gem(directory, model, **settings):
    """Write a GEM model over a tiny one; settings are those of its gem.json."""
    backbone = load_backbone(model)
    lora = Lora(LoraConfig(rank=4, alpha=8.0), backbone.config, seed=1)
    torch.manual_seed(3)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(std=0.1)
    settings = Settings(**{"n_special": 3, "max_length": 128, **settings})
    special = 0.1 * torch.randn(settings.n_special, backbone.config.hidden_size)
    write_adapter(
        directory,
        lora.weights(),
        base=str(model),
        fingerprint=backbone.fingerprint,
        tags=("gem",),
    )
    write_special(directory, SpecialTokens(special, 3.0, settings))
    return directory
