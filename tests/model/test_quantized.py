"""Backbones whose linears are kept in groups, against ones of the very same values in float32."""

import numpy as np
import pytest
import torch
from quantized_models import BATCH, copy_with_a_weight, dequantized, trained_factors
from tiny_gguf import KINDS, write_gguf

from gen_fast.errors import ConfigError, UnsupportedModelError, WeightsError
from gen_fast.model.batch import PackedBatch
from gen_fast.model.choices import GROUP_BITS
from gen_fast.model.linear import GroupWeight
from gen_fast.model.lora import MATRICES, Lora, LoraConfig
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.model.weights import load_backbone
from gen_fast.testing import WHOLE_BLOCKS, relative_error, save_tiny_model


@pytest.fixture(params=GROUP_BITS)
def group(request):
    return request.param


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_states_are_those_of_the_dequantised_model(quantizable, group, mask):
    backbone = load_backbone(quantizable, quantize=group, packed=True)
    assert backbone.quantize == group
    expected = dequantized(backbone).forward(BATCH, mask=mask)
    assert relative_error(backbone.forward(BATCH, mask=mask), expected) <= 1e-5
    plain = load_backbone(quantizable)
    assert plain.quantize is None
    error = relative_error(expected, plain.forward(BATCH, mask=mask))
    assert 0.01 < error * 2 ** (GROUP_BITS[group] - 4) < 0.5
    assert backbone.fingerprint == plain.fingerprint


def test_gradients_are_those_of_the_dequantised_model(quantizable, group):
    quantized = load_backbone(quantizable, quantize=group)
    gradients = []
    for backbone in (quantized, dequantized(quantized)):
        lora = Lora(LoraConfig(rank=4, alpha=8), backbone.config, seed=3)
        special = torch.linspace(-1, 1, 64).expand(2, 64).clone().requires_grad_()
        torch.manual_seed(0)
        with torch.no_grad():
            for b in lora.b:
                b.normal_()
        vocabulary = backbone.config.vocab_size
        batch = PackedBatch.pack([np.array([5, vocabulary, 9]), np.array([vocabulary + 1, 4])])
        backbone.forward(batch, special=special, update=lora).square().sum().backward()
        gradients.append([special.grad, *(parameter.grad for parameter in lora.parameters())])
    for own, other in zip(*gradients, strict=True):
        assert relative_error(own, other) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_other_dtypes(quantizable_llama, group, dtype):
    backbone = load_backbone(quantizable_llama, quantize=group, dtype=dtype)
    assert backbone.dtype == dtype
    expected = load_backbone(quantizable_llama, quantize=group).forward(BATCH)
    assert relative_error(backbone.forward(BATCH).float(), expected) <= 0.05


@pytest.mark.parametrize(
    ("kind", "group"), [("Q4_0", "int4"), ("Q4_1", "int4"), ("Q8_0", "int8-weight-only")]
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # llama's rows are in another order there
def test_blocks_of_gguf_keep_their_values(tmp_path, monkeypatch, family, kind, group):
    monkeypatch.setenv("GEN_FAST_CACHE", str(tmp_path / "cache"))
    model = save_tiny_model(tmp_path / "model", family, **WHOLE_BLOCKS)
    write_gguf(tmp_path / "model.gguf", model, kind=KINDS[kind])
    source = resolve(tmp_path / "model.gguf")
    expected = load_backbone(source)
    actual = dequantized(load_backbone(source, quantize=group))
    for own, other in zip(actual.layers, expected.layers, strict=True):
        assert all(torch.equal(getattr(own, name), getattr(other, name)) for name in MATRICES)


def test_the_shipped_model_keeps_its_values_in_a_third_of_bfloat16s_memory(smollm2):
    expected = load_backbone(smollm2)
    backbone = load_backbone(smollm2, quantize="int4")
    linears = sum(getattr(layer, m).nbytes for layer in backbone.layers for m in MATRICES)
    assert linears <= 0.35 * sum(
        getattr(layer, m).nbytes // 2 for layer in expected.layers for m in MATRICES
    )
    for own, other in zip(dequantized(backbone).layers, expected.layers, strict=True):
        assert all(torch.equal(getattr(own, m), getattr(other, m)) for m in MATRICES)
    texts = ["where do polar bears live", "Gold is a chemical element with the symbol Au."]
    tokenizer = load_tokenizer(smollm2)
    batch = PackedBatch.pack([np.array(tokenizer.core.encode(text).ids) for text in texts])
    assert relative_error(backbone.forward(batch), expected.forward(batch)) <= 1e-5


def test_adapters_are_merged_before(quantizable_llama, group):
    adapters = [trained_factors(quantizable_llama)]
    merged = load_backbone(quantizable_llama, adapters=adapters)
    backbone = load_backbone(quantizable_llama, adapters=adapters, quantize=group)
    for own, other in zip(backbone.layers, merged.layers, strict=True):
        assert torch.equal(own.down.blocks, GroupWeight.of(other.down, group).blocks)
    assert backbone.fingerprint == merged.fingerprint


def test_an_unknown_kind_is_refused(quantizable_llama):
    with pytest.raises(
        ConfigError, match="quantize 'int3' is not one of int4, int8-weight-only, int8,"
    ):
        load_backbone(quantizable_llama, quantize="int3")


def test_a_size_without_whole_blocks_is_refused_by_name(tiny_model, group):
    message = rf"q_proj.weight is \[48, 48\]: {group} takes"
    with pytest.raises(UnsupportedModelError, match=message):
        load_backbone(tiny_model, quantize=group)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 70000.0])
def test_values_that_float16_does_not_hold_are_refused_by_name(
    quantizable_llama, tmp_path, group, bad
):
    copy_with_a_weight(quantizable_llama, tmp_path, bad)
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load_backbone(tmp_path, quantize=group)
