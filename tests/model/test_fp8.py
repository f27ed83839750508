"""Backbones whose linears and their inputs are in fp8, computed by the reference."""

import numpy as np
import pytest
import torch
from quantized_models import (
    BATCH,
    copy_with_a_weight,
    error_with_an_adapter,
    errors_of,
    gradient_at_special_tokens,
)

from gen_fast.errors import ConfigError, UnsupportedModelError, WeightsError
from gen_fast.model.batch import PackedBatch
from gen_fast.model.weights import load_backbone
from gen_fast.testing import relative_error, save_tiny_model


@pytest.fixture(autouse=True)
def _by_the_reference(fp8_by_the_reference):
    """In every test here."""


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_states_are_near_those_of_the_plain_model(quantizable, mask):
    errors = errors_of("fp8", quantizable, mask)
    assert 1e-3 < errors.inference < 0.15
    assert errors.training < 0.03
    assert errors.weights < 0.15


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
    assert error_with_an_adapter("fp8", quantizable_llama) < 0.4


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
    copy_with_a_weight(quantizable_llama, tmp_path, float("nan"))
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
