import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.dropout import OP, dropout
from gen_fast.ops.dropout.philox import philox
from gen_fast.ops.dropout.reference import dropout as reference
from gen_fast.testing import assert_no_worse, check_gradients

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(0, 8), (1, 1), (3, 7), (5, 577), (2, 1100)]


def rows(shape, dtype=torch.float32, device="cpu"):
    """x, text_keys and positions: two texts, of keys that fill their 32 bits."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(device, dtype)
    place = torch.arange(shape[0], device=device)
    return x, torch.where(place % 2 == 0, -3, 2**31 - 1), place // 2


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, seed, words):
    """philox4x32 of 10 rounds in kat_vectors, which the authors publish with Random123."""
    actual = philox(seed, [torch.tensor(word) for word in counter])
    assert " ".join(f"{int(word):08x}" for word in actual) == words


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, device, impl):
    x, *where = rows(shape, dtype, device)
    for settings in ((0.05, 3, 0), (0.7, 2**63 - 1, 2**31 - 1)):
        actual = dropout(x, *where, *settings, impl=impl)
        exact = reference(x.double(), *where, *settings)
        assert torch.equal(actual != 0, exact != 0)
        assert_no_worse(actual, reference(x, *where, *settings), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for shape in SHAPES:
        test_matches_float64(shape, dtype, "cpu", "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[2:])
def test_gradient(shape, dtype, device, grad_impl):
    x, *where = rows(shape, dtype)
    inputs = (x.requires_grad_(), *where, 0.3, 7, 1)
    check_gradients(dropout, reference, inputs, grad_impl, device)


def test_gradient_in_float64():
    x, *where = rows((4, 9), torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: dropout(x, *where, 0.4, 7, 1, impl="reference"), x.requires_grad_()
    )


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_a_share_p_is_dropped(p):
    x, *where = rows((300, 1000))
    dropped = (dropout(x, *where, p, 1, 0) == 0).double()
    for mean, count in ((dropped.mean(), 300_000), (dropped.mean(0), 300), (dropped.mean(1), 1000)):
        sigma = (p * (1 - p) / count) ** 0.5
        assert ((mean - p).abs() <= (4 if mean.dim() == 0 else 5) * sigma).all()


def test_a_row_drops_the_same_wherever_it_is(device, impl):
    x, keys, positions = rows((6, 50), device=device)
    whole = dropout(x, keys, positions, 0.3, 1, 2, impl=impl)
    order = torch.tensor([4, 0, 3], device=device)
    some = dropout(x[order], keys[order].int(), positions[order], 0.3, 1, 2, impl=impl)
    assert torch.equal(some, whole[order])
    narrow = dropout(x[:, :7], keys + 2**32, positions, 0.3, 1, 2, impl=impl)
    assert torch.equal(narrow, whole[:, :7])


def test_everything_that_counts_changes_what_is_dropped(device, impl):
    x, keys, positions = rows((3, 200), device=device)
    x = torch.ones_like(x)
    inputs = ((keys, positions, 0.5, 1, 2), (keys + 1, positions, 0.5, 1, 2))
    inputs += ((keys, positions + 1, 0.5, 1, 2), (keys, positions, 0.5, 2**32 + 1, 2))
    inputs += ((keys, positions, 0.5, 2, 2), (keys, positions, 0.5, 1, 3))
    kept = torch.stack([dropout(x, *rest, impl=impl) != 0 for rest in inputs]).flatten(1)
    agreeing = (kept.unsqueeze(0) == kept.unsqueeze(1)).double().mean(-1)
    assert (agreeing - torch.eye(len(inputs), device=device) < 0.6).all()


def test_non_contiguous_input(device, impl):
    x, *where = rows((6, 80), device=device)
    for view in (x[:, 8:72], x.repeat(1, 2)[:, ::2]):
        actual = dropout(view, *where, 0.3, 1, 2, impl=impl)
        torch.testing.assert_close(actual, reference(view, *where, 0.3, 1, 2))


def test_without_dropout_x_itself_is_returned():
    x, *where = rows((3, 5))
    assert dropout(x, *where, 0.0, 1, 2) is x


def test_what_makes_no_sense_is_refused():
    x, keys, positions = rows((3, 5))
    for inputs, message in (
        ((x[0], keys, positions, 0.1, 0, 0), r"rows \[T, N\]"),
        ((x, keys[:2], positions, 0.1, 0, 0), r"rows \[T, N\]"),
        ((x, keys.float(), positions, 0.1, 0, 0), "text_keys must be int32 or int64"),
        ((x, keys, positions.int(), 0.1, 0, 0), "positions must be int64"),
        ((x, keys, positions, 1.0, 0, 0), "below 1, not 1.0"),
        ((x, keys, positions, -0.1, 0, 0), "at least 0"),
        ((x, keys, positions, float("nan"), 0, 0), "not nan"),
        ((x, keys, positions, 0.1, -1, 0), "seed"),
        ((x, keys, positions, 0.1, 0, 2**31), "stream"),
    ):
        with pytest.raises(gen_fast.OpError, match=message):
            dropout(*inputs)


def test_opcheck():
    x, *where = rows((3, 8))
    opcheck(OP.torch_op, (x.requires_grad_(), *where, 0.3, 1, 2))
