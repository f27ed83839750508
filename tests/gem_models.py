"""Tiny GEM models, what is trained of them far from where it begins."""

import torch

from gen_fast.formats.causal_lm import write_causal_lm
from gen_fast.formats.gem import Settings, SpecialTokens, write_special
from gen_fast.formats.peft import write_adapter
from gen_fast.model.lora import Lora, LoraConfig
from gen_fast.model.tensor_files import find_tensors
from gen_fast.model.weights import load_backbone


def save_gem(directory, model, *, full=False, **settings):
    """Write a GEM model over a tiny one; settings are those of its gem.json.

    full: a whole model, and not an adapter.
    """
    backbone = load_backbone(model)
    lora = Lora(LoraConfig(rank=4, alpha=8.0), backbone.config, seed=1)
    torch.manual_seed(3)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(std=0.1)
    settings = Settings(**{"n_special": 3, "max_length": 128, **settings})
    special = 0.1 * torch.randn(settings.n_special, backbone.config.hidden_size)
    if full:
        files, factors = find_tensors(model), lora.weights()
        linears = {n: factors.merged(n, files.stored(f"{n}.weight")) for n in factors.factors}
        write_causal_lm(directory, model, model, linears, base=str(model), tags=("gem",))
    else:
        write_adapter(
            directory,
            lora.weights(),
            base=str(model),
            fingerprint=backbone.fingerprint,
            tags=("gem",),
        )
    write_special(directory, SpecialTokens(special, 3.0, settings))
    return directory
