"""Values of quantised backbones and what they lose, and a batch for them."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch
from gen_fast.model.lora import MATRICES, Lora, LoraConfig, LoraWeights
from gen_fast.model.weights import load_backbone
from gen_fast.testing import forget_checksums, relative_error, with_layers

BATCH = PackedBatch.pack([np.arange(3, 40), np.arange(60, 65)], needed=[2, 1])


def dequantized(backbone: Backbone) -> Backbone:
    """The same values as matrices of float32."""
    layers = []
    for layer in backbone.layers:
        matrices = {name: getattr(layer, name) for name in MATRICES}
        assert not any(isinstance(matrix, Tensor) for matrix in matrices.values())
        wide = {name: matrix.dequantized(torch.float32) for name, matrix in matrices.items()}
        layers.append(replace(layer, **wide))
    return with_layers(backbone, layers)


def gradient_at_special_tokens(directory: Path, quantize: str | None) -> Tensor:
    """Of a loss over a small batch of both kinds of tokens, as a vector."""
    backbone = load_backbone(directory, quantize=quantize)
    special = torch.linspace(-1, 1, 64).expand(2, 64).clone().requires_grad_()
    vocabulary = backbone.config.vocab_size
    batch = PackedBatch.pack([np.array([5, vocabulary, 9]), np.array([vocabulary + 1, 4])])
    backbone.forward(batch, special=special).square().sum().backward()
    return special.grad.flatten()


@dataclass(frozen=True)
class Errors:
    """Relative errors of a quantised backbone's states."""

    inference: float  # against the plain model
    training: float  # against its own in inference
    weights: float  # against the plain model, of its weights alone


def errors_of(quantize: str, directory: Path, mask: str) -> Errors:
    """Of a model that is quantised to 8 bits, its weights packed."""
    backbone = load_backbone(
        directory, quantize=quantize, packed=True, bidirectional=mask != "causal"
    )
    plain = load_backbone(directory)
    assert backbone.quantize == quantize
    assert backbone.fingerprint == plain.fingerprint
    expected = plain.forward(BATCH, mask=mask)
    with torch.inference_mode():
        fused = backbone.forward(BATCH, mask=mask)
    return Errors(
        inference=relative_error(fused, expected),
        training=relative_error(backbone.forward(BATCH, mask=mask), fused),
        weights=relative_error(dequantized(backbone).forward(BATCH, mask=mask), expected),
    )


def trained_factors(directory: Path) -> LoraWeights:
    """An adapter of a model, far from where training begins."""
    lora = Lora(LoraConfig(rank=4, alpha=8), load_backbone(directory).config, seed=1)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(std=0.1)
    return lora.weights()


def error_with_an_adapter(quantize: str, directory: Path) -> float:
    """Of a backbone with a merged adapter, as a share of what the adapter changes."""
    adapters = [trained_factors(directory)]
    merged = load_backbone(directory, adapters=adapters)
    backbone = load_backbone(directory, adapters=adapters, quantize=quantize)
    assert backbone.fingerprint == merged.fingerprint
    with torch.inference_mode():
        expected = merged.forward(BATCH)
        error = relative_error(backbone.forward(BATCH), expected)
        return error / relative_error(expected, load_backbone(directory).forward(BATCH))


def copy_with_a_weight(directory: Path, copy: Path, value: float) -> None:
    """Copy a model's files, a weight of its layer 1's up_proj being `value`."""
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, copy / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, copy)
    forget_checksums(copy)
