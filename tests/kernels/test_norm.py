import pytest
import torch

from gen_fast.ops.norm import OP, add_rms_norm, rms_norm
from gen_fast.ops.norm.reference import add_rms_norm as reference
from gen_fast.testing import assert_no_worse

SHAPES = [(0, 48), (1, 1), (1, 63), (7, 576), (33, 1000)]


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_matches_float64(shape, dtype, impl):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    exact = reference(x.double(), residual.double(), weight.double(), 1e-5)
    plain = reference(x, residual, weight, 1e-5)
    # The sum may be written into its second argument.
    actual = add_rms_norm(x, residual.clone(), weight, 1e-5, impl=impl)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_no_worse(a, p, e)


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
def test_non_contiguous_input(impl):
    x, residual = torch.randn(2, 10, 96)[:, :, ::2], torch.randn(10, 48)
    expected = reference(x[0], residual, torch.ones(48), 1e-6)
    actual = add_rms_norm(x[0], residual.clone(), torch.ones(48), 1e-6, impl=impl)
    torch.testing.assert_close(actual, expected)


def test_rms_norm_of_a_constant_row_is_the_weight():
    weight = torch.randn(16)
    torch.testing.assert_close(
        rms_norm(torch.full((2, 16), 3.0), weight, 0.0), weight.expand(2, 16)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set(isa_level, shape, dtype):
    test_add_rms_norm_matches_float64(shape, dtype, "cpu")
