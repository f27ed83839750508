import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.dropout import dropout
from gen_fast.ops.lora_down import OP, Dropped, lora_down
from gen_fast.ops.lora_down.reference import lora_down as reference
from gen_fast.testing import assert_no_worse, check_gradients

DTYPES = (torch.float32, torch.bfloat16)
# Rows, width, rank, parts; more rows than the gradient of A sums in one program.
SHAPES = [(1, 7, 1, 1), (70, 293, 5, 3), (9, 136, 16, 2), (1100, 40, 17, 1)]
STREAMS = (5, 2**31 - 1, 0, 9)


def inputs(shape, dtype=torch.float32, device="cpu"):
    """x, a, text_keys, positions and streams."""
    rows, size, rank, parts = shape
    torch.manual_seed(0)
    x = torch.randn(rows, size).to(device, dtype)
    a = torch.randn(parts * rank, size).to(device, dtype)
    place = torch.arange(rows, device=device)
    return x, a, torch.where(place % 2 == 0, -3, 2**31 - 1), place // 2, STREAMS[:parts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, device, impl):
    x, a, *where, streams = inputs(shape, dtype, device)
    for p, seed in ((0.05, 3), (0.7, 2**63 - 1)):
        dropped = Dropped(*where, p, seed, streams)
        actual = lora_down(x, a, dropped, impl=impl)
        exact = reference(x.double(), a.double(), dropped)
        assert_no_worse(actual, reference(x, a, dropped), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, dtype, device, grad_impl):
    x, a, *where, streams = inputs(shape, dtype)
    where = [values.to(device) for values in where]
    leaves = x.requires_grad_(), a.requires_grad_(), Dropped(*where, 0.3, 7, streams)
    check_gradients(lora_down, reference, leaves, grad_impl, device)


def test_gradient_in_float64():
    x, a, *where, streams = inputs((4, 9, 2, 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a: lora_down(x, a, Dropped(*where, 0.4, 7, streams), impl="reference"),
        (x.requires_grad_(), a.requires_grad_()),
    )


def test_it_drops_what_dropout_drops(device, impl):
    x, _, *where, streams = inputs((6, 32, 1, 3), device=device)
    a = torch.eye(32, device=device).repeat(3, 1)  # each part shows its own input
    parts = lora_down(x, a, Dropped(*where, 0.3, 1, streams), impl=impl).split(32, 1)
    for part, stream in zip(parts, streams, strict=True):
        torch.testing.assert_close(part, dropout(x, *where, 0.3, 1, stream))


def test_no_rows_and_rows_that_lie_apart(device, impl):
    x, a, *where, streams = inputs((6, 32, 4, 2), device=device)
    dropped = Dropped(*where, 0.3, 1, streams)
    apart = lora_down(torch.cat((x, x), 1)[:, 32:], a, dropped, impl=impl)
    torch.testing.assert_close(apart, reference(x, a, dropped), atol=1e-5, rtol=1e-5)
    nowhere = Dropped(*(values[:0] for values in where), 0.3, 1, streams)
    assert lora_down(x[:0], a, nowhere, impl=impl).shape == (0, 8)


def test_what_makes_no_sense_is_refused():
    x, a, *where, streams = inputs((6, 32, 4, 2))
    for factors, dropped, message in (
        (a[:, :5], (*where, 0.1, 0, streams), r"a must be \[2 parts of one rank, 32\]"),
        (a[:7], (*where, 0.1, 0, streams), r"not \[7, 32\]"),
        (a, (*where, 0.1, 0, ()), "1 to 4 parts share an input, not 0"),
        (a[:5], (*where, 0.1, 0, (1, 2, 3, 4, 5)), "not 5"),
        (a, (*where, 1.0, 0, streams), "below 1, not 1.0"),
        (a, (where[0][:2], where[1], 0.1, 0, streams), r"rows \[T, N\]"),
    ):
        with pytest.raises(gen_fast.OpError, match=message):
            lora_down(x, factors, Dropped(*dropped))


def test_opcheck():
    x, a, *where, streams = inputs((3, 8, 2, 2))
    opcheck(OP.torch_op, (x.requires_grad_(), a.requires_grad_(), *where, 0.3, 1, list(streams)))
