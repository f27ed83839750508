"""Backbones whose linears and their inputs are of 8 bits."""

import pytest
import torch
from quantized_models import (
    BATCH,
    copy_with_a_weight,
    error_with_an_adapter,
    errors_of,
    gradient_at_special_tokens,
)

import gen_fast
from gen_fast.embed.sample_texts import SAMPLE_TEXTS
from gen_fast.errors import ConfigError, UnsupportedModelError, WeightsError
from gen_fast.io.vectors import centred_cosine
from gen_fast.model.int8 import smoothed
from gen_fast.model.linear import Int8Weight, QuantizedRows, linear
from gen_fast.model.prefix import PrefixCache
from gen_fast.model.quantized import check_device
from gen_fast.model.weights import load_backbone
from gen_fast.testing import relative_error, save_tiny_model, with_layers


def test_a_weight_is_near_and_its_product_nearer_than_without_a_rotation():
    torch.manual_seed(0)
    weight, x = torch.randn(48, 96), torch.randn(20, 96)
    x[:, 5] *= 100  # an input that stands out
    exact = x.double() @ weight.double().T
    own = Int8Weight.of(weight)
    assert relative_error(own.dequantized(torch.float32), weight) < 0.01
    error = (linear(x, own) - exact).norm() / exact.norm()
    assert torch.equal(linear(QuantizedRows.of(x, own.row_format), own), linear(x, own))
    scale = x.abs().amax(1, keepdim=True) / 127
    plain = ((x / scale).round() * scale).double() @ weight.double().T
    assert error < 0.5 * (plain - exact).norm() / exact.norm()


def test_factors_change_nothing_of_what_a_layer_computes(quantizable):
    plain = load_backbone(quantizable)
    torch.manual_seed(0)
    config = plain.config
    sizes = {
        "qkv": config.hidden_size,
        "gate_up": config.hidden_size,
        "down": config.intermediate_size,
    }
    largest = {name: torch.rand(size) * 30 for name, size in sizes.items()}
    largest["qkv"][3] = 0.0
    moved = with_layers(plain, [smoothed(layer, largest) for layer in plain.layers])
    assert relative_error(moved.forward(BATCH), plain.forward(BATCH)) <= 1e-5
    for own, other in zip(moved.layers, plain.layers, strict=True):
        assert not torch.allclose(own.qkv, other.qkv)


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_states_are_near_those_of_the_plain_model(quantizable, mask):
    errors = errors_of("int8", quantizable, mask)
    assert 1e-4 < errors.inference < 0.1
    # What trains computes the same; a value on the edge of a step may fall to its other side.
    assert errors.training < 0.01
    # Of the difference only a part is the weights'.
    assert errors.weights < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_other_dtypes(quantizable_llama, dtype):
    backbone = load_backbone(quantizable_llama, quantize="int8", dtype=dtype)
    assert backbone.dtype == dtype
    with torch.inference_mode():
        expected = load_backbone(quantizable_llama, quantize="int8").forward(BATCH)
        assert relative_error(backbone.forward(BATCH).float(), expected) <= 0.05


def test_gradients_at_special_tokens_point_the_same_way(quantizable):
    gradients = [gradient_at_special_tokens(quantizable, quantize) for quantize in (None, "int8")]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


def test_the_shipped_adapter_is_served_nearly_as_before(smollm2):
    """What bench/quantized.py measures on many texts."""
    vectors = [
        gen_fast.load("smollm2-135m", dtype="float32", device="cpu", quantize=quantize).encode(
            list(SAMPLE_TEXTS)
        )
        for quantize in (None, "int8")
    ]
    assert centred_cosine(vectors[1], vectors[0]).mean() > 0.985


def test_adapters_are_merged_before(quantizable_llama):
    assert error_with_an_adapter("int8", quantizable_llama) < 0.2


def test_a_prefix_of_other_weights_is_not_taken(quantizable_llama, tmp_path):
    for quantize in (None, "int8"):
        cache = PrefixCache(load_backbone(quantizable_llama, quantize=quantize))
        cache.get((3, 4, 5))
        cache.save(tmp_path / str(quantize))
    assert cache.load(tmp_path / "int8") == 1
    with pytest.raises(gen_fast.PrefixCacheError, match="quantize None, this backbone has int8"):
        cache.load(tmp_path / "None")


def test_few_texts_are_refused(quantizable_llama):
    with pytest.raises(ConfigError, match="at least 20 texts, not on 3"):
        load_backbone(quantizable_llama, quantize="int8", calibration=["a", "b", "c"])


def test_a_size_without_whole_blocks_is_refused_by_name(tmp_path):
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    save_tiny_model(tmp_path, "llama", **sizes)
    with pytest.raises(UnsupportedModelError, match=r"q_proj is \[24, 24\]: int8 takes"):
        load_backbone(tmp_path, quantize="int8")


def test_values_that_are_not_finite_are_refused_by_name(quantizable_llama, tmp_path):
    copy_with_a_weight(quantizable_llama, tmp_path, float("nan"))
    with pytest.raises(WeightsError, match="holds NaN or infinity"):
        load_backbone(tmp_path, quantize="int8")


def test_a_gpu_on_which_int8_saves_no_time_is_said(caplog):
    check_device("int8", "cuda", torch.bfloat16)
    assert "slower than bfloat16" in caplog.text
    caplog.clear()
    check_device("int8", "cpu", torch.bfloat16)
    assert not caplog.text
