"""Backbones whose linears and their inputs are in int8; what fp8 keeps too: test_8_bits.py."""

import pytest
import torch
from quantized_models import BATCH

import gen_fast
from gen_fast.embed.sample_texts import SAMPLE_TEXTS
from gen_fast.errors import ConfigError
from gen_fast.io.vectors import centred_cosine
from gen_fast.model.int8 import smoothed
from gen_fast.model.linear import Int8Weight, QuantizedRows, linear
from gen_fast.model.prefix import PrefixCache
from gen_fast.model.quantized import check_device
from gen_fast.model.weights import load_backbone
from gen_fast.testing import relative_error, with_layers


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


def test_the_shipped_adapter_is_served_nearly_as_before(smollm2):
    """What bench/quantized.py measures on many texts."""
    vectors = [
        gen_fast.load("smollm2-135m", dtype="float32", device="cpu", quantize=quantize).encode(
            list(SAMPLE_TEXTS)
        )
        for quantize in (None, "int8")
    ]
    assert centred_cosine(vectors[1], vectors[0]).mean() > 0.985


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


def test_a_gpu_on_which_int8_saves_no_time_is_said(caplog):
    check_device("int8", "cuda", torch.bfloat16)
    assert "slower than bfloat16" in caplog.text
    caplog.clear()
    check_device("int8", "cpu", torch.bfloat16)
    assert not caplog.text
