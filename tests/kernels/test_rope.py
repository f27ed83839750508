import pytest
import torch

from gen_fast.ops.rope import OP, rope
from gen_fast.ops.rope.reference import rope as reference
from gen_fast.testing import assert_no_worse


def inputs(rows, heads, size, dtype, with_norm):
    torch.manual_seed(0)
    fused = torch.randn(rows, heads + 2, size).to(dtype)
    angles = torch.randn(rows, size // 2) * 10
    norm = torch.randn(heads, size).to(dtype) if with_norm else None
    return fused[:, :heads], angles.cos(), angles.sin(), norm


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "size"), [(0, 3, 64), (1, 1, 2), (9, 12, 64), (5, 4, 80)]
)
def test_matches_float64(rows, heads, size, with_norm, dtype, impl):
    x, cos, sin, norm = inputs(rows, heads, size, dtype, with_norm)
    wide = None if norm is None else norm.double()
    exact = reference(x.double(), cos.double(), sin.double(), wide, 1e-6)
    plain = reference(x, cos, sin, norm, 1e-6)
    assert_no_worse(rope(x.clone(), cos, sin, norm, 1e-6, impl=impl), plain, exact)


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
def test_every_instruction_set(isa_level, with_norm, dtype):
    for rows, heads, size in ((1, 1, 2), (9, 12, 64), (5, 4, 80)):
        test_matches_float64(rows, heads, size, with_norm, dtype, "cpu")
