import numpy as np
import pytest
import torch

import gen_fast
from gen_fast import ops
from gen_fast.model import backbone as backbone_module
from gen_fast.model.backbone import Backbone, padded_rows
from gen_fast.model.batch import PackedBatch
from gen_fast.model.linear import Fp8Weight, Int8Weight, can_pack, linear, pack, times
from gen_fast.model.prefix import PrefixCache
from gen_fast.model.weights import load_backbone
from gen_fast.testing import assert_no_worse, relative_error

packing = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="this torch has no oneDNN")
PACKED_DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            not can_pack(torch.zeros(1, 1, dtype=dtype)),
            reason=f"this processor has no packed products in {dtype}",
        ),
    )
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 33, 2049])
def test_a_packed_weight_gives_the_product_of_the_plain_one(rows, biased, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 50).to(dtype), torch.randn(70, 50).to(dtype)
    bias = torch.randn(70).to(dtype) if biased else None
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.no_grad():
        assert_no_worse(linear(x, pack(weight), bias), linear(x, weight, bias), exact)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_a_packed_weight_gives_the_gradient_of_the_plain_one(dtype):
    torch.manual_seed(0)
    weight, grad = torch.randn(70, 50).to(dtype), torch.randn(33, 70).to(dtype)
    gradients = []
    for used in (weight, pack(weight)):
        x = torch.zeros(33, 50, dtype=dtype, requires_grad=True)
        linear(x, used).backward(grad)
        gradients.append(x.grad)
    assert_no_worse(gradients[1], gradients[0], grad.double() @ weight.double())


@packing
def test_an_encoder_packs_its_backbone_and_keeps_its_numbers(tiny_model):
    texts = ["one text", "and another, longer one"]
    packed = gen_fast.load(tiny_model, device="cpu", dtype="float32")
    assert all(layer.qkv.is_mkldnn for layer in packed.backbone.layers)
    plain = gen_fast.load(tiny_model, device="cpu", dtype="float32")
    plain.backbone = load_backbone(tiny_model)
    assert packed.backbone.nbytes == plain.backbone.nbytes
    difference = abs(packed.encode(texts) - plain.encode(texts)).max()
    assert difference <= 1e-5 * abs(plain.encode(texts)).max()


def test_padding_rows_make_few_numbers_of_rows_and_change_no_result(tiny_model, monkeypatch):
    assert len({padded_rows(n) for n in range(1024, 2049)}) == 33
    assert max(padded_rows(n) / n for n in range(1, 5000)) < 1.04
    backbone = load_backbone(tiny_model)
    rows_met = set()
    plain_append = backbone_module.append
    monkeypatch.setattr(
        backbone_module,
        "append",
        lambda table, special, ids: rows_met.add(len(ids)) or plain_append(table, special, ids),
    )
    for needed in (None, [2, 1, 0]):
        batch = PackedBatch.pack([np.arange(3, 3 + n) for n in (50, 1, 61)], needed=needed)
        with torch.no_grad():
            monkeypatch.setattr(Backbone, "packed", False)
            expected = backbone.forward(batch)
            monkeypatch.setattr(Backbone, "packed", True)
            actual = backbone.forward(batch)
        torch.testing.assert_close(actual, expected)
    assert rows_met == {112}
    prefix = backbone.prefill(tuple(range(3, 70)))
    assert len(prefix.layers[0][0]) == 67  # of 68 rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", [None, "sdpa,reference", "reference"])
def test_padding_rows_hold_numbers_and_embeddings_owe_nothing_to_fresh_memory(
    tiny_model, monkeypatch, isa, impl, dtype, request
):
    """Hidden size 48 and feed-forward size 80: no multiples of what oneDNN's products read at once.

    They read over the end of a row, so that NaN in a padding row would reach the row before it.
    """
    monkeypatch.setattr(ops, "FORCED", impl)
    # As where weights are packed, which they are only for dtypes that this processor multiplies.
    monkeypatch.setattr(Backbone, "packed", True)
    encoder = gen_fast.load(tiny_model, device="cpu", dtype=dtype)
    texts = ["a", "two words", "x" * 31, "a longer text, of more than one sentence."]
    prompts = (None, "Say it again: ")
    expected = [encoder.encode(texts, prompt=prompt) for prompt in prompts]
    request.getfixturevalue("nan_in_fresh_memory")
    encoder.prefixes = PrefixCache(encoder.backbone)
    for prompt, embeddings in zip(prompts, expected, strict=True):
        assert np.isfinite(embeddings).all()
        np.testing.assert_array_equal(encoder.encode(texts, prompt=prompt), embeddings)
    sequences = [np.arange(3, 3 + n) for n in (50, 1, 61)]
    for needed in (None, [2, 1, 0]):
        batch = PackedBatch.pack(sequences, needed=needed)
        with torch.no_grad():
            assert encoder.backbone.forward(batch).isfinite().all()


@pytest.mark.parametrize(("kind", "loss"), [(Int8Weight, 0.02), (Fp8Weight, 0.06)])
def test_rows_that_have_a_gradient_are_not_rounded(kind, loss, fp8_by_the_reference):
    torch.manual_seed(0)
    weight = kind.of(torch.randn(48, 96))
    x, bias = torch.randn(7, 96, requires_grad=True), torch.randn(48)
    y = linear(x, weight, bias)
    exact = x.double() @ weight.dequantized(torch.float64).T + bias
    assert relative_error(y, exact) < 1e-6
    assert 1e-3 < relative_error(linear(x.detach(), weight, bias), exact) < loss
    grad = torch.randn(7, 48)
    y.backward(grad)
    expected = grad.double() @ weight.dequantized(torch.float64)
    assert relative_error(x.grad, expected) < 1e-6
    assert torch.equal(times(grad, weight), x.grad)
