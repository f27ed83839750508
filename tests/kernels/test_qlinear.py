import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.qlinear import OP, quantize_rows
from gen_fast.ops.qlinear.reference import dequantize_rows
from gen_fast.ops.qlinear.reference import quantize_rows as reference
from gen_fast.testing import refuses_fp8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 63), (5, 1000)])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_matches_the_reference(kind, shape, dtype, with_carry, device, impl):
    if refuses_fp8(OP, device, kind, impl):
        return
    torch.manual_seed(0)
    x = (5 * torch.randn(shape)).to(device, dtype)
    q, scale = quantize_rows(x, kind, impl=impl)
    expected, expected_scale = reference(x, kind)
    assert q.dtype == expected.dtype
    torch.testing.assert_close(scale, expected_scale)
    # A quotient computed another way may fall on the other side of a rounding boundary.
    step = 1 if kind == "int8" else 32
    steps = (with_carry(q, expected.float()) - expected.float()).abs() / step
    assert (steps <= 1).all()
    assert (steps > 0).float().mean().nan_to_num() < 0.01


def test_error_is_at_most_half_a_step_and_zero_rows_stay_zero(device, impl):
    x = torch.randn(4, 100, device=device)
    x[1] = 0
    q, scale = quantize_rows(x, impl=impl)
    assert q.abs().amax(-1).tolist() == [127, 0, 127, 127]
    error = (dequantize_rows(q, scale) - x).abs()
    assert (error <= scale.unsqueeze(-1) * 0.501).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 16, 100, 1000])
def test_every_instruction_set(isa_level, size, dtype):
    x = (5 * torch.randn(7, size)).to(dtype)
    q, scale = quantize_rows(x, impl="cpu")
    expected, expected_scale = reference(x, "int8")
    torch.testing.assert_close(scale, expected_scale)
    assert torch.equal(q, expected)


@pytest.mark.parametrize("at", [0, 3, 97])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_such_a_scale(isa_level, bad, at):
    x = torch.randn(3, 100)
    x[1, at] = bad
    for impl in ("cpu", "reference"):
        assert quantize_rows(x, impl=impl)[1].isfinite().tolist() == [True, False, True]


def test_an_unknown_format_is_refused():
    with pytest.raises(gen_fast.OpError, match="int8, fp8, not to 'int3'"):
        quantize_rows(torch.ones(1, 2), "int3")


def test_opcheck():
    for kind in ("int8", "fp8"):
        opcheck(OP.torch_op, (torch.randn(3, 8), kind))
