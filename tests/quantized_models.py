"""Values of quantised backbones, what they are made of, and a batch for them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch
from gen_fast.model.lora import MATRICES, Lora, LoraConfig, LoraWeights
from gen_fast.model.weights import load_backbone
from gen_fast.testing import forget_checksums, with_layers

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


def trained_factors(directory: Path) -> LoraWeights:
    """An adapter of a model, far from where training begins."""
    lora = Lora(LoraConfig(rank=4, alpha=8), load_backbone(directory).config, seed=1)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(std=0.1)
    return lora.weights()


def copy_with_a_weight(directory: Path, copy: Path, value: float) -> None:
    """Copy a model's files, a weight of its layer 1's up_proj being `value`."""
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, copy / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, copy)
    forget_checksums(copy)
