import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.pool import OP, pool
from gen_fast.ops.pool.reference import pool as reference
from gen_fast.testing import assert_no_worse

CU_SEQLENS = [0, 1, 11, 14, 15]
# One column, a tail beside whole vectors, and (on a GPU) several vectors a thread.
SIZES = [1, 48, 63, 1000]


def inputs(dtype, weighted, size=48):
    torch.manual_seed(0)
    hidden, norm = torch.randn(15, size).to(dtype), torch.randn(size).to(dtype)
    weights = torch.rand(15) if weighted else None
    return hidden, torch.tensor(CU_SEQLENS).int(), norm, 1e-5, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_matches_float64(size, weighted, dtype, device, impl):
    def to(x, dtype=None):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(device, dtype if x.is_floating_point() else None)

    arguments = inputs(dtype, weighted, size)
    exact = reference(*(to(x, torch.float64) for x in arguments))
    rounded = reference(*map(to, arguments))
    actual = pool(*map(to, arguments), impl=impl)
    assert actual.dtype == torch.float32
    assert_no_worse(actual, rounded, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8192, 9000, 40_001, 65_536])
def test_long_rows(size, dtype, device, impl):
    test_matches_float64(size, True, dtype, device, impl)


def test_a_text_without_rows_is_nan_and_harms_no_other(device, impl):
    hidden, norm = torch.randn(3, 48, device=device), torch.ones(48, device=device)
    cu_seqlens = torch.tensor([0, 2, 2, 3], device=device).int()
    result = pool(hidden, cu_seqlens, norm, 1e-5, impl=impl)
    assert result.isfinite().all(1).tolist() == [True, False, True]


def test_mean_then_projection_equals_projection_then_mean():
    """The collapse that makes one product a text enough: both maps are linear."""
    hidden, cu_seqlens = torch.randn(8, 16).double(), torch.tensor([0, 3, 8])
    weight, bias = torch.randn(4, 16).double(), torch.randn(4).double()
    mean = pool(hidden, cu_seqlens, torch.ones(16).double(), 1e-5)
    collapsed = torch.nn.functional.linear(mean, weight, bias)
    rows = torch.nn.functional.rms_norm(hidden, (16,), None, 1e-5) @ weight.T + bias
    torch.testing.assert_close(collapsed, torch.stack((rows[:3].mean(0), rows[3:].mean(0))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_instruction_set(isa, weighted, dtype):
    for size in SIZES:
        test_matches_float64(size, weighted, dtype, "cpu", "cpu")


def test_what_does_not_fit_is_refused():
    hidden, cu_seqlens, norm = torch.ones(3, 8), torch.tensor([0, 3]).int(), torch.ones(8)
    with pytest.raises(gen_fast.OpError, match="do not fit"):
        pool(hidden, cu_seqlens, norm[:7], 1e-5)
    with pytest.raises(gen_fast.OpError, match="3 rows need as many weights"):
        pool(hidden, cu_seqlens, norm, 1e-5, torch.ones(2))


def test_row_weights_may_be_strided(device, impl):
    hidden, norm = torch.randn(3, 48, device=device), torch.ones(48, device=device)
    cu_seqlens = torch.tensor([0, 2, 3], device=device).int()
    weights = torch.tensor([[0.2, 9.0], [0.8, 9.0], [1.0, 9.0]], device=device)[:, 0]
    expected = pool(hidden, cu_seqlens, norm, 1e-5, weights, impl="reference")
    torch.testing.assert_close(pool(hidden, cu_seqlens, norm, 1e-5, weights, impl=impl), expected)


def test_opcheck():
    for weighted in (False, True):
        opcheck(OP.torch_op, inputs(torch.float32, weighted))


def test_there_is_no_gradient():
    hidden, *rest = inputs(torch.float32, False)
    with pytest.raises(gen_fast.ImplementationError, match="has no gradient"):
        pool(hidden.requires_grad_(), *rest)
    with pytest.raises(gen_fast.ImplementationError, match="has no gradient"):
        OP.torch_op(hidden, *rest[:4]).sum().backward()
