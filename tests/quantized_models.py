"""Backbones with other layers, and a batch for them: for the tests of quantised weights."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.backbone import Backbone, LayerWeights
from gen_fast.model.batch import PackedBatch
from gen_fast.model.lora import MATRICES

FAMILIES = ("llama", "mistral-window", "qwen2", "qwen3")
BATCH = PackedBatch.pack([np.arange(3, 40), np.arange(60, 65)], needed=[2, 1])


def with_layers(backbone: Backbone, layers: Iterable[LayerWeights]) -> Backbone:
    """The same backbone with other layers."""
    return Backbone(
        backbone.config,
        backbone.embedding,
        tuple(layers),
        backbone.final_norm,
        backbone.fingerprint,
    )


def dequantized(backbone: Backbone) -> Backbone:
    """The same values as matrices of float32."""
    layers = []
    for layer in backbone.layers:
        matrices = {name: getattr(layer, name) for name in MATRICES}
        assert not any(isinstance(matrix, Tensor) for matrix in matrices.values())
        wide = {name: matrix.dequantized(torch.float32) for name, matrix in matrices.items()}
        layers.append(replace(layer, **wide))
    return with_layers(backbone, layers)
