"""Weights and rows of 8 bits: what is measured of a backbone, and what is made of its layers.

A product does not change when a weight's inputs are multiplied by factors s and the rows it meets
are divided by them. Chosen by the largest values on both sides, the factors leave rows that lose
less to 8 bits. They cost nothing where something before the product can take them: the norm's
weight before q, k, v and before gate, up; the rows of up before down.

Source: Xiao et al., arXiv 2211.10438 (SmoothQuant), eq. 4. What is rotated: linear.Int8Weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_fast.errors import ConfigError, UnsupportedModelError, WeightsError
from gen_fast.model.backbone import Backbone, LayerWeights
from gen_fast.model.batch import PackedBatch, split_by_budget
from gen_fast.model.config import BackboneConfig
from gen_fast.model.dropout import RowDropout
from gen_fast.model.linear import Int8Weight, Weight, linear
from gen_fast.model.lora import MATRICES, linear_sizes
from gen_fast.model.quantized import SCALE
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.model.update import FrozenLinear
from gen_fast.ops.qlinear import fits_int8, int8_blocks_shape

FEWEST_TEXTS = 20
# SmoothQuant's own is 0.5. By a look at 120 texts SmolLM2's adapter lost as much with 0.5 and 0.6,
# more with 0.7, and method mean least with 0.6.
_ALPHA = 0.6
_MAX_TOKENS = 512  # of a text
_BATCH_TOKENS = 2048
# Matrices before which something takes the factors.
SMOOTHED = ("qkv", "gate_up", "down")


def check_calibration(texts: Sequence[str]) -> None:
    """Raise ConfigError for too few texts."""
    if len(texts) < FEWEST_TEXTS:
        raise ConfigError(
            f"int8 is calibrated on at least {FEWEST_TEXTS} texts, not on {len(texts)}"
        )


def check_sizes(config: BackboneConfig) -> None:
    """Raise UnsupportedModelError for a linear that has no whole blocks of 8 bits."""
    for name, shape in linear_sizes(config).items():
        if not fits_int8(shape):
            raise UnsupportedModelError(
                f"{name} is {list(shape)}: int8 takes multiples of 16 rows and 4 columns"
            )


def tokenized(directory: Path, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of texts by the tokenizer of a backbone's directory."""
    tokenizer = load_tokenizer(directory)
    ids = (tokenizer.ids(text, add_special_tokens=True)[:_MAX_TOKENS] for text in texts)
    return [row for row in ids if len(row)]


def int8_layers(
    backbone: Backbone, sequences: Sequence[np.ndarray], mask: str
) -> list[LayerWeights]:
    """The layers of a float32 backbone with Int8Weights, norms still in float32.

    sequences: token ids to calibrate on. mask: of attention, as the backbone will be used.
    Raises WeightsError for values that are not finite.
    """
    largest = largest_inputs(backbone, sequences, mask)
    layers = []
    for i, layer in enumerate(backbone.layers):
        layer = smoothed(layer, {name: largest[i, name] for name in SMOOTHED})
        matrices: dict[str, Any] = {}
        for name in MATRICES:
            matrices[name] = matrix = Int8Weight.of(_dense(getattr(layer, name)))
            if not matrix.scale.isfinite().all():
                raise WeightsError(f"layers.{i}: {name} holds NaN or infinity")
        layers.append(replace(layer, **matrices))
    return layers


def smoothed(layer: LayerWeights, largest: Mapping[str, Tensor]) -> LayerWeights:
    """A layer that computes the same, the factors of SmoothQuant moved into its weights.

    largest: of the inputs of each matrix by name, [in] magnitudes.
    """
    qkv, gate_up, down = (_dense(getattr(layer, name)) for name in SMOOTHED)
    for_qkv = _factors(largest["qkv"], qkv)
    for_gate_up = _factors(largest["gate_up"], gate_up)
    for_down = _factors(largest["down"], down)
    gate, up = (gate_up * for_gate_up).chunk(2)
    return replace(
        layer,
        attention_norm=layer.attention_norm / for_qkv,
        qkv=qkv * for_qkv,
        mlp_norm=layer.mlp_norm / for_gate_up,
        gate_up=torch.cat((gate, up / for_down.unsqueeze(1))),
        down=down * for_down,
    )


def int8_tensors(backbone: Backbone) -> dict[str, Tensor]:
    """What a copy has of an int8 backbone that its original has not: by name, norms in float32.

    The backbone's dtype must be float32.
    """
    sizes = linear_sizes(backbone.config)
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(backbone.layers):
        prefix = f"layers.{i}."
        tensors[f"{prefix}input_layernorm.weight"] = layer.attention_norm
        tensors[f"{prefix}post_attention_layernorm.weight"] = layer.mlp_norm
        for name, modules in MATRICES.items():
            matrix = getattr(layer, name)
            assert isinstance(matrix, Int8Weight)
            shapes = [sizes[f"{prefix}{module}"] for module in modules]
            blocks = matrix.blocks.split([int8_blocks_shape(shape)[0] for shape in shapes])
            scales = matrix.scale.split([out for out, _ in shapes])
            for module, part, scale in zip(modules, blocks, scales, strict=True):
                tensors[f"{prefix}{module}.weight"] = part
                tensors[f"{prefix}{module}{SCALE}"] = scale
    return tensors


def _factors(largest: Tensor, weight: Tensor) -> Tensor:
    """One for each input; 1 for an input, or a column, that is always 0."""
    columns = weight.abs().amax(0)
    factors = largest**_ALPHA / columns ** (1 - _ALPHA)
    return torch.where((largest > 0) & (columns > 0), factors, 1.0)


def _dense(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight


def largest_inputs(
    backbone: Backbone, sequences: Sequence[np.ndarray], mask: str
) -> dict[tuple[int, str], Tensor]:
    """The largest magnitude of each input [in] of every matrix, by layer and name."""
    seen = _LargestInputs()
    pending = list(sequences)
    with torch.inference_mode():
        while pending:
            members = next(split_by_budget([len(row) for row in pending], _BATCH_TOKENS))
            batch = PackedBatch.pack(pending[members], device=backbone.device)
            backbone.forward(batch, mask=mask, update=seen)
            pending = pending[members.stop :]
    return seen.largest


class _LargestInputs:
    """An Update that changes nothing and keeps the largest magnitude of each input."""

    dropout = 0.0

    def __init__(self) -> None:
        self.largest: dict[tuple[int, str], Tensor] = {}

    def cast(self, dtype: torch.dtype) -> "_LargestInputs":
        return self

    def linear(self, x: Tensor, frozen: FrozenLinear, drop: RowDropout | None = None) -> Tensor:
        magnitudes = x.abs().amax(0)
        before = self.largest.get(frozen.key)
        self.largest[frozen.key] = (
            magnitudes if before is None else torch.maximum(before, magnitudes)
        )
        return linear(x, frozen.weight, frozen.bias)
