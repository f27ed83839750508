"""Weights in fp8 and products with them: of qlinear, beside its rows."""

from functools import partial

import pytest
import torch
from products_of_8_bits import (
    WRONG_SCALES_AND_BIASES,
    assert_rows_need_not_be_adjacent,
    assert_stays_in_its_row,
    exact_product,
)
from torch.library import opcheck

import gen_fast
from gen_fast.ops.qlinear import FP8 as OP
from gen_fast.ops.qlinear import (
    dequantize_weight_fp8,
    fits_fp8,
    fp8_linear,
    quantize_rows,
    quantize_weight_fp8,
)
from gen_fast.testing import assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (out, in): the smallest, odd multiples of 16, a layer's.
SHAPES = [(16, 16), (48, 80), (112, 576), (80, 1056)]


def example(rows, shape, device="cpu", dtype=torch.float32, biased=False):
    """Rows, their scales, a weight, scales of outputs, and a bias or None."""
    torch.manual_seed(0)
    out, inputs = shape
    x = torch.randn(rows, inputs)
    if rows > 1:
        x[1] = 0  # a row whose scale is 0
    q, scale = quantize_rows(x, "fp8", impl="reference")
    weight, weight_scale = quantize_weight_fp8(torch.randn(shape) / inputs**0.5)
    bias = torch.randn(out).to(device, dtype) if biased else None
    return *(x.to(device) for x in (q, scale, weight, weight_scale)), bias


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


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 5, 17, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(dtype, rows, shape, biased, device, impl):
    inputs = example(rows, shape, device, dtype, biased)
    reference = fp8_linear(*inputs, dtype=dtype, impl="reference")
    assert_no_worse(fp8_linear(*inputs, dtype=dtype, impl=impl), reference, exact_product(*inputs))


def test_rows_need_not_be_adjacent(device, impl):
    inputs = example(5, (48, 64), device)
    assert_rows_need_not_be_adjacent(partial(fp8_linear, impl=impl), *inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad, device, impl):
    inputs = example(14, (48, 64), device)
    assert_stays_in_its_row(bad, partial(fp8_linear, impl=impl), *inputs)


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        (0, torch.zeros(2, 16), r"float8_e4m3fn \[T, 16\], not torch.float32"),
        (0, torch.zeros(2, 32).to(torch.float8_e4m3fn), r"\[2, 32\]"),
        (2, torch.zeros(16, 16, dtype=torch.int8), "int8"),
        (2, torch.zeros(24, 16).to(torch.float8_e4m3fn), r"multiples of 16, not .*\[24, 16\]"),
        *WRONG_SCALES_AND_BIASES,
    ],
)
def test_what_does_not_fit_is_refused(changed, value, message):
    inputs = list(example(2, (16, 16)))
    inputs[changed] = value
    with pytest.raises(gen_fast.OpError, match=message):
        fp8_linear(*inputs, impl="reference")


def test_the_reference_runs_only_where_it_is_named(monkeypatch):
    inputs = example(2, (16, 16))
    monkeypatch.setattr("gen_fast.ops.FORCED", None)
    with pytest.raises(gen_fast.ImplementationError, match="runs on cuda, not on cpu"):
        fp8_linear(*inputs)
    monkeypatch.setattr("gen_fast.ops.FORCED", "cpu,reference")
    assert torch.equal(fp8_linear(*inputs), fp8_linear(*inputs, impl="reference"))


def test_older_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("gen_fast.ops.gpu._capability", lambda index: (90, 80)[index])
    with pytest.raises(gen_fast.ImplementationError, match="needs sm_89 for fp8, not sm_80"):
        OP._first_of(gen_fast.ops.Case("cuda", torch.float8_e4m3fn), None)


def test_opcheck():
    q, scale, weight, weight_scale, bias = example(3, (32, 64), biased=True)
    opcheck(
        OP.torch_op,
        (q, weight, scale, weight_scale, bias, torch.float32),
        {"impl": "reference"},
        # Not the schema's: torch compares inputs there, which it cannot in fp8.
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
