"""Values of quantised backbones, and a batch for them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch
from gen_fast.model.lora import MATRICES
from gen_fast.model.weights import load_backbone
from gen_fast.testing import with_layers

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
