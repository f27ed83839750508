"""Adapters merged into a backbone while it is loaded, against the same adapters beside it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gen_fast.errors import BackboneMismatchError
from gen_fast.model.backbone import LayerWeights
from gen_fast.model.batch import PackedBatch
from gen_fast.model.lora import Lora, LoraConfig, LoraWeights
from gen_fast.model.weights import load_backbone, read_fingerprint
from gen_fast.testing import relative_error, save_tiny_model

BATCH = PackedBatch.pack([np.arange(3, 40), np.arange(60, 65)])


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def directory(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("merging")
    save_tiny_model(directory, request.param)
    return directory


def random_adapter(directory, seed: int, **options) -> LoraWeights:
    config = LoraConfig(**{"rank": 4, "alpha": 6, **options})
    lora = Lora(config, load_backbone(directory).config, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(std=0.1)
    return lora.weights()


def states(backbone, lora=None) -> torch.Tensor:
    with torch.no_grad():
        return backbone.forward(BATCH, mask="bidirectional", update=lora)


def lora_of(backbone, weights: LoraWeights) -> Lora:
    return Lora.from_factors(weights.config, backbone.config, weights.factors)


@pytest.mark.parametrize("packed", [False, True])
def test_merged_equals_unmerged(directory, packed):
    plain, one = load_backbone(directory), random_adapter(directory, 1)
    merged = load_backbone(directory, adapters=[one], packed=packed)
    expected = states(plain, lora_of(plain, one))
    assert relative_error(states(plain), expected) > 0.01
    assert relative_error(states(merged), expected) <= 1e-5
    other = random_adapter(directory, 2, rank=2, modules=("v_proj", "down_proj"))
    both = load_backbone(directory, adapters=[one, other], packed=packed)
    expected = states(merged, lora_of(merged, other))
    assert relative_error(states(both), expected) <= 1e-5


def test_the_sum_is_float32_and_rounded_once(directory):
    adapters = [random_adapter(directory, 1), random_adapter(directory, 2)]
    wide = load_backbone(directory, adapters=adapters)
    rounded = load_backbone(directory, adapters=adapters, dtype=torch.bfloat16)
    for a, b in zip(wide.layers, rounded.layers, strict=True):
        for name in LayerWeights.__dataclass_fields__:
            if getattr(a, name) is not None:
                assert torch.equal(getattr(a, name).bfloat16(), getattr(b, name)), name
    stored = load_file(directory / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    for adapter in adapters:
        a, b = adapter.factors["layers.1.mlp.down_proj"]
        stored = stored.float() + 1.5 * (b @ a)
    torch.testing.assert_close(wide.layers[1].down, stored, rtol=1e-6, atol=1e-6)


def test_the_fingerprint_is_that_of_the_merged_weights(directory):
    adapter = random_adapter(directory, 1)
    merged = load_backbone(directory, adapters=[adapter]).fingerprint
    assert merged == read_fingerprint(directory, adapters=[adapter])
    assert merged == load_backbone(directory, adapters=[adapter], dtype=torch.bfloat16).fingerprint
    assert merged != read_fingerprint(directory)
    assert merged["embedding_sha256"] == read_fingerprint(directory)["embedding_sha256"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 4}, r"updates 'layers.3.*this one of 3 layers"),
    ({"num_hidden_layers": 2}, r"does not update 'layers.2"),
    ({"intermediate_size": 96}, r"updates 'layers.0.* as a matrix .*, this backbone has "),
])  # fmt: skip
def test_an_adapter_of_another_base_is_named(directory, tmp_path, changes, message):
    save_tiny_model(tmp_path, "qwen2", **changes)
    with pytest.raises(BackboneMismatchError, match=message):
        load_backbone(directory, adapters=[random_adapter(tmp_path, 1)])


def test_a_linear_that_is_missing_is_named(directory):
    adapter = random_adapter(directory, 1)
    factors = {k: v for k, v in adapter.factors.items() if k != "layers.1.self_attn.k_proj"}
    with pytest.raises(BackboneMismatchError, match=r"does not update 'layers.1.self_attn.k_proj'"):
        load_backbone(directory, adapters=[replace(adapter, factors=factors)])
