import pytest
import torch

from gen_fast.ops.pool import OP, pool
from gen_fast.ops.pool.reference import pool as reference
from gen_fast.testing import assert_no_worse


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_matches_float64(normalize, weighted, projected, dtype, impl):
    torch.manual_seed(0)
    counts = torch.tensor([1, 10, 3, 1])
    offsets = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    hidden, norm = torch.randn(15, 48).to(dtype), torch.randn(48).to(dtype)
    weights = torch.rand(15) if weighted else None
    projection, bias = (torch.randn(20, 48), torch.randn(20)) if projected else (None, None)
    options = (weights, projection, bias)
    wide = [None if x is None else x.double() for x in options]
    exact = reference(hidden.double(), offsets, norm.double(), 1e-5, *wide, normalize)
    plain = reference(hidden, offsets, norm, 1e-5, *options, normalize)
    actual = pool(hidden, offsets, norm, 1e-5, *options, normalize, impl=impl)
    assert actual.dtype == torch.float32
    assert_no_worse(actual, plain, exact)


def test_mean_then_projection_equals_projection_then_mean():
    """The collapse that makes one product a text enough: both maps are linear."""
    hidden, offsets = torch.randn(8, 16).double(), torch.tensor([0, 3, 8])
    weight, bias = torch.randn(4, 16).double(), torch.randn(4).double()
    collapsed = pool(hidden, offsets, torch.ones(16).double(), 1e-5, None, weight, bias)
    rows = torch.nn.functional.rms_norm(hidden, (16,), None, 1e-5) @ weight.T + bias
    torch.testing.assert_close(collapsed, torch.stack((rows[:3].mean(0), rows[3:].mean(0))))
