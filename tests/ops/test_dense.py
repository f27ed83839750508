"""The product that one of two libraries computes, by each of them."""

import pytest
import torch

from gen_fast.ops import dense
from gen_fast.testing import assert_no_worse


@pytest.fixture(params=[True, False], ids=["onednn", "torch"], autouse=True)
def library(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(dense, "_onednn_is_faster_than_mkl", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 17), (130, 64, 1000), (64, 1000, 96)])
@pytest.mark.parametrize("kind", ["plain", "bias", "transposed", "parts", "both transposed"])
def test_matches_float64(shape, kind):
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if kind == "bias" else None
    if kind == "transposed":
        weight = weight.T.contiguous().T
    if kind == "parts":
        x = torch.cat((x, x), 1)[:, :inputs]
        weight = torch.cat((weight, weight), 1)[:, :inputs]
    if kind == "both transposed":
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    exact = x.double() @ weight.double().T
    if bias is not None:
        exact = exact + bias
    actual = dense.product(x, weight, bias)
    assert actual.dtype == torch.float32
    assert_no_worse(actual, torch.nn.functional.linear(x, weight, bias), exact)


def test_onednn_is_given_no_weight_with_gaps():
    weight = torch.randn(6, 8)
    for whole in (weight, weight.T, weight[2:5], weight.T[:, 2:5]):
        assert dense.without_gaps(whole) is whole
    for part in (weight[:, 1:4], weight.T[1:4]):
        packed = dense.without_gaps(part)
        assert torch.equal(packed, part)
        assert packed.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_of_nothing(shape):
    rows, inputs, outputs = shape
    actual = dense.product(torch.ones(rows, inputs), torch.ones(outputs, inputs))
    assert torch.equal(actual, torch.zeros(rows, outputs))


def test_other_dtypes_are_torchs(library):
    assert dense.by_onednn(torch.ones(1, 1)) == library
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert not dense.by_onednn(torch.ones(1, 1, dtype=dtype))
