"""Backbones whose linears and their inputs are of 8 bits: what both formats must keep."""

import numpy as np
import pytest
import torch
from quantized_models import BATCH, copy_with_a_weight, dequantized, trained_factors

from gen_fast.errors import UnsupportedModelError, WeightsError
from gen_fast.model.batch import PackedBatch
from gen_fast.model.weights import load_backbone
from gen_fast.testing import relative_error, save_tiny_model


@pytest.fixture(params=["int8", "fp8"])
def kind(request, monkeypatch):
    """Each format; fp8 in plain torch, as a CPU does not compute it."""
    if request.param == "fp8":
        monkeypatch.setattr("gen_fast.ops.FORCED", "cpu,reference")
    return request.param


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_states_are_near_those_of_the_plain_model(quantizable, kind, mask):
    backbone = load_backbone(
        quantizable, quantize=kind, packed=True, bidirectional=mask != "causal"
    )
    plain = load_backbone(quantizable)
    assert backbone.quantize == kind
    assert backbone.fingerprint == plain.fingerprint
    expected = plain.forward(BATCH, mask=mask)
    with torch.inference_mode():
        fused = backbone.forward(BATCH, mask=mask)
    least, most = {"int8": (1e-4, 0.1), "fp8": (1e-3, 0.15)}[kind]
    assert least < relative_error(fused, expected) < most
    # What trains computes the same; a value on the edge of a step may fall to its other side.
    in_training = relative_error(backbone.forward(BATCH, mask=mask), fused)
    assert in_training < {"int8": 0.01, "fp8": 0.03}[kind]
    # Of the difference only a part is the weights'.
    of_weights = relative_error(dequantized(backbone).forward(BATCH, mask=mask), expected)
    assert of_weights < {"int8": 0.1, "fp8": 0.15}[kind]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_other_dtypes(quantizable_llama, kind, dtype):
    backbone = load_backbone(quantizable_llama, quantize=kind, dtype=dtype)
    assert backbone.dtype == dtype
    with torch.inference_mode():
        expected = load_backbone(quantizable_llama, quantize=kind).forward(BATCH)
        error = relative_error(backbone.forward(BATCH).float(), expected)
    assert error <= {"int8": 0.05, "fp8": 0.1}[kind]


def test_gradients_at_special_tokens_point_the_same_way(quantizable, kind):
    gradients = []
    for quantize in (None, kind):
        backbone = load_backbone(quantizable, quantize=quantize)
        special = torch.linspace(-1, 1, 64).expand(2, 64).clone().requires_grad_()
        vocabulary = backbone.config.vocab_size
        batch = PackedBatch.pack([np.array([5, vocabulary, 9]), np.array([vocabulary + 1, 4])])
        backbone.forward(batch, special=special).square().sum().backward()
        gradients.append(special.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95


def test_adapters_are_merged_before(quantizable_llama, kind):
    adapters = [trained_factors(quantizable_llama)]
    merged = load_backbone(quantizable_llama, adapters=adapters)
    backbone = load_backbone(quantizable_llama, adapters=adapters, quantize=kind)
    assert backbone.fingerprint == merged.fingerprint
    with torch.inference_mode():
        expected = merged.forward(BATCH)
        error = relative_error(backbone.forward(BATCH), expected)
        changed = relative_error(expected, load_backbone(quantizable_llama).forward(BATCH))
    assert error / changed < {"int8": 0.2, "fp8": 0.4}[kind]


def test_a_size_that_does_not_fit_is_refused_by_name(tmp_path, kind):
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    save_tiny_model(tmp_path, "llama", **sizes)
    name = {"int8": "q_proj", "fp8": "q_proj.weight"}[kind]
    with pytest.raises(UnsupportedModelError, match=rf"{name} is \[24, 24\]: {kind} takes"):
        load_backbone(tmp_path, quantize=kind)


def test_values_that_are_not_finite_are_refused_by_name(quantizable_llama, tmp_path, kind):
    copy_with_a_weight(quantizable_llama, tmp_path, float("nan"))
    with pytest.raises(WeightsError, match="holds NaN or infinity"):
        load_backbone(tmp_path, quantize=kind)
