"""Backbones whose linears and their inputs are in fp8, computed by the reference."""

import numpy as np
import pytest
import torch
from quantized_models import BATCH, dequantized, gradient_at_special_tokens
from safetensors.torch import load_file, save_file

from gen_fast.errors import ConfigError, UnsupportedModelError, WeightsError
from gen_fast.model.batch import PackedBatch
from gen_fast.model.lora import Lora, LoraConfig
from gen_fast.model.weights import load_backbone
from gen_fast.testing import forget_checksums, relative_error, save_tiny_model


@pytest.fixture(autouse=True)
def _by_the_reference(fp8_by_the_reference):
    """In every test here."""


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_states_are_near_those_of_the_plain_model(quantizable, mask):
    backbone = load_backbone(
        quantizable, quantize="fp8", packed=True, bidirectional=mask != "causal"
    )
    plain = load_backbone(quantizable)
    assert backbone.quantize == "fp8"
    assert backbone.fingerprint == plain.fingerprint
    expected = plain.forward(BATCH, mask=mask)
    with torch.inference_mode():
        fused = backbone.forward(BATCH, mask=mask)
    assert 1e-3 < relative_error(fused, expected) < 0.15
    assert relative_error(backbone.forward(BATCH, mask=mask), fused) < 0.03
    assert relative_error(dequantized(backbone).forward(BATCH, mask=mask), expected) < 0.15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_other_dtypes(quantizable_llama, dtype):
    backbone = load_backbone(quantizable_llama, quantize="fp8", dtype=dtype)
    with torch.inference_mode():
        expected = load_backbone(quantizable_llama, quantize="fp8").forward(BATCH)
        assert relative_error(backbone.forward(BATCH).float(), expected) <= 0.1


def test_gradients_at_special_tokens_point_the_same_way(quantizable):
    gradients = [gradient_at_special_tokens(quantizable, quantize) for quantize in (None, "fp8")]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


def test_adapters_are_merged_before(quantizable_llama):
    lora = Lora(LoraConfig(rank=4, alpha=8), load_backbone(quantizable_llama).config, seed=1)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(std=0.1)
    adapters = [lora.weights()]
    merged = load_backbone(quantizable_llama, adapters=adapters)
    backbone = load_backbone(quantizable_llama, adapters=adapters, quantize="fp8")
    assert backbone.fingerprint == merged.fingerprint
    with torch.inference_mode():
        difference = relative_error(backbone.forward(BATCH), merged.forward(BATCH))
        assert difference < 0.4 * relative_error(
            merged.forward(BATCH), load_backbone(quantizable_llama).forward(BATCH)
        )


def test_a_device_without_fp8_is_refused_with_what_it_needs(quantizable_llama, monkeypatch):
    monkeypatch.setattr("gen_fast.ops.FORCED", None)
    with pytest.raises(ConfigError, match=r"fp8 needs a GPU of sm_89 or newer .*, and cpu is none"):
        load_backbone(quantizable_llama, quantize="fp8")


def test_a_size_that_does_not_fit_is_refused_by_name(tmp_path):
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    save_tiny_model(tmp_path, "llama", **sizes)
    with pytest.raises(UnsupportedModelError, match=r"q_proj.weight is \[24, 24\]: fp8 takes"):
        load_backbone(tmp_path, quantize="fp8")


def test_values_that_are_not_finite_are_refused_by_name(quantizable_llama, tmp_path):
    tensors = load_file(quantizable_llama / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((quantizable_llama / name).read_text())
    forget_checksums(tmp_path)
    with pytest.raises(WeightsError, match="holds NaN or infinity"):
        load_backbone(tmp_path, quantize="fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_what_the_reference_does(quantizable_llama, dtype, monkeypatch):
    expected = load_backbone(quantizable_llama, quantize="fp8", dtype=dtype)
    with torch.inference_mode():
        expected = expected.forward(BATCH).float()
    monkeypatch.setattr("gen_fast.ops.FORCED", None)
    backbone = load_backbone(quantizable_llama, quantize="fp8", dtype=dtype, device="cuda")
    batch = PackedBatch.pack([np.arange(3, 40), np.arange(60, 65)], needed=[2, 1], device="cuda")
    with torch.inference_mode():
        actual = backbone.forward(batch).float().cpu()
    assert relative_error(actual, expected) <= 0.1
