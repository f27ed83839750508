import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.rope import BACKWARD, OP, rope
from gen_fast.ops.rope.reference import rope as reference
from gen_fast.testing import assert_no_worse, check_gradients

SHAPES = [(0, 3, 64), (1, 1, 2), (9, 12, 64), (5, 4, 80), (4, 3, 44)]
SHAPES += [(3, 2, 96), (3, 2, 128), (2, 1, 256)]


def inputs(rows, heads, size, dtype, with_norm):
    torch.manual_seed(0)
    fused = torch.randn(rows, heads + 2, size).to(dtype)
    angles = torch.randn(rows, size // 2) * 10
    norm = torch.randn(heads, size).to(dtype) if with_norm else None
    return fused[:, :heads], angles.cos(), angles.sin(), norm


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, with_norm, dtype, inplace, device, impl):
    tensors = [None if t is None else t.to(device) for t in inputs(*shape, dtype, with_norm)]
    exact = reference(*(None if t is None else t.double() for t in tensors), 1e-6)
    plain = reference(*tensors, 1e-6)
    kept = tensors[0].clone()
    assert_no_worse(rope(*tensors, 1e-6, inplace=inplace, impl=impl), plain, exact)
    assert inplace or torch.equal(tensors[0], kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, with_norm, dtype, device, grad_impl):
    x, *rest = inputs(*shape, dtype, with_norm)
    x = x.detach().requires_grad_()
    check_gradients(rope, reference, (x, *rest, 1e-6), grad_impl, device)


def test_rotation_keeps_lengths_and_depends_on_relative_position_only():
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64)
    frequency = 10_000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)

    def at(x, position):
        angles = position * frequency.unsqueeze(0)
        return rope(x, angles.cos(), angles.sin(), impl="reference")

    torch.testing.assert_close(at(q, 5).norm(), q.norm())
    torch.testing.assert_close((at(q, 5) * at(k, 2)).sum(), (at(q, 103) * at(k, 100)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_every_instruction_set(isa, shape, with_norm, dtype):
    test_matches_float64(shape, with_norm, dtype, True, "cpu", "cpu")
    test_gradient(shape, with_norm, dtype, "cpu", "cpu")


@pytest.mark.parametrize(
    ("size", "half", "norm", "message"),
    [
        (7, 3, None, "even head size"),
        (8, 3, None, "even head size"),
        (8, 4, torch.ones(2, 7), "norm must be"),
        (8, 4, torch.ones(2, 8).bfloat16(), "norm must be"),
    ],
)
def test_what_does_not_fit_is_refused(size, half, norm, message):
    x, angles = torch.ones(3, 2, size), torch.ones(3, half)
    for call in (rope, OP.torch_op):
        with pytest.raises(gen_fast.OpError, match=message):
            call(x, angles, angles, norm, 1e-6)


def test_opcheck():
    for with_norm in (False, True):
        x, cos, sin, norm = inputs(3, 2, 8, torch.float32, with_norm)
        opcheck(OP.torch_op, (x.requires_grad_(), cos, sin, norm, 1e-6))
        saved = x.detach() if with_norm else None
        opcheck(BACKWARD.torch_op, (torch.randn(3, 2, 8), saved, cos, sin, norm, 1e-6))
