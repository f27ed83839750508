"""Weights in fp8 and products with them; what int8 keeps too: test_qlinear_8_bits.py."""

import pytest
import torch
from products_of_8_bits import FP8
from torch.library import opcheck

import gen_fast
from gen_fast.ops.qlinear import dequantize_weight_fp8, fits_fp8, quantize_weight_fp8


def test_a_weight_is_quantised_by_output():
    torch.manual_seed(0)
    weight = torch.randn(48, 80)
    weight[3] = 0
    q, scale = quantize_weight_fp8(weight)
    assert q.dtype == torch.float8_e4m3fn
    assert q.float().abs().amax(1).tolist() == [0 if i == 3 else 448 for i in range(48)]
    # Three bits of mantissa; the smallest steps are 2^-9.
    error = (dequantize_weight_fp8(q, scale) - weight).abs()
    assert (error <= weight.abs() / 15 + scale.unsqueeze(1) * 2**-9).all()


def test_which_sizes_fit():
    assert fits_fp8((32, 48))
    assert not fits_fp8((24, 64))
    assert not fits_fp8((32, 40))


def test_the_reference_runs_only_where_it_is_named(monkeypatch):
    inputs = FP8.example(2, (16, 16))
    monkeypatch.setattr("gen_fast.ops.FORCED", None)
    with pytest.raises(gen_fast.ImplementationError, match="runs on cuda, not on cpu"):
        FP8.linear(*inputs)
    monkeypatch.setattr("gen_fast.ops.FORCED", "cpu,reference")
    assert torch.equal(FP8.linear(*inputs), FP8.linear(*inputs, impl="reference"))


def test_older_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("gen_fast.ops.gpu._capability", lambda index: (90, 80)[index])
    with pytest.raises(gen_fast.ImplementationError, match="needs sm_89 for fp8, not sm_80"):
        FP8.op._first_of(gen_fast.ops.Case("cuda", torch.float8_e4m3fn), None)


def test_opcheck():
    q, scale, weight, weight_scale, bias = FP8.example(3, (32, 64), biased=True)
    opcheck(
        FP8.op.torch_op,
        (q, weight, scale, weight_scale, bias, torch.float32),
        {"impl": "reference"},
        # Not the schema's: torch compares inputs there, which it cannot in fp8.
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
