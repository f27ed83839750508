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


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("kind", ["plain", "columns", "transposed"])
def test_into(kind, add):
    torch.manual_seed(0)
    x, weight, before = torch.randn(40, 96), torch.randn(33, 96), torch.randn(40, 33)
    out = {
        "plain": torch.empty(40, 33),
        "columns": torch.empty(40, 3, 33)[:, 1],
        "transposed": torch.empty(33, 40).T,
    }[kind]
    out.copy_(before if add else torch.full_like(before, torch.nan))
    dense.product_into(out, x, weight, add=add)
    start = before if add else torch.zeros_like(before)
    exact = start.double() + x.double() @ weight.double().T
    assert_no_worse(out, start + x @ weight.T, exact)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_of_nothing(shape):
    rows, inputs, outputs = shape
    actual = dense.product(torch.ones(rows, inputs), torch.ones(outputs, inputs))
    assert torch.equal(actual, torch.zeros(rows, outputs))


def test_other_dtypes_are_torchs(library):
    assert dense.by_onednn(torch.ones(1, 1)) == library
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert not dense.by_onednn(torch.ones(1, 1, dtype=dtype))
