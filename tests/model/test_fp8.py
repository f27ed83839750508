"""Backbones whose linears and their inputs are in fp8; what int8 keeps too: test_8_bits.py."""

import numpy as np
import pytest
import torch
from quantized_models import BATCH

from gen_fast.errors import ConfigError
from gen_fast.model.batch import PackedBatch
from gen_fast.model.weights import load_backbone
from gen_fast.testing import relative_error


def test_a_device_without_fp8_is_refused_with_what_it_needs(quantizable_llama, monkeypatch):
    monkeypatch.setattr("gen_fast.ops.FORCED", None)
    with pytest.raises(ConfigError, match=r"fp8 needs a GPU of sm_89 or newer .*, and cpu is none"):
        load_backbone(quantizable_llama, quantize="fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_what_the_reference_does(
    quantizable_llama, dtype, fp8_by_the_reference, monkeypatch
):
    expected = load_backbone(quantizable_llama, quantize="fp8", dtype=dtype)
    with torch.inference_mode():
        expected = expected.forward(BATCH).float()
    monkeypatch.setattr("gen_fast.ops.FORCED", None)
    backbone = load_backbone(quantizable_llama, quantize="fp8", dtype=dtype, device="cuda")
    batch = PackedBatch.pack([np.arange(3, 40), np.arange(60, 65)], needed=[2, 1], device="cuda")
    with torch.inference_mode():
        actual = backbone.forward(batch).float().cpu()
    assert relative_error(actual, expected) <= 0.1
