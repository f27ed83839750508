import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops import gpu
from gen_fast.ops.norm import QUANTIZED as NORM
from gen_fast.ops.qlinear import OP, ROTATED, quantize_rows, rotate_rows
from gen_fast.ops.qlinear.reference import FORMATS, dequantize_rows
from gen_fast.ops.qlinear.reference import quantize_rows as reference
from gen_fast.ops.swiglu import QUANTIZED as SWIGLU
from gen_fast.testing import check_quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 63), (4, 576), (5, 1000)])
def test_matches_the_reference(row_format, shape, dtype, with_carry, device, impl):
    torch.manual_seed(0)
    x = (5 * torch.randn(shape)).to(device, dtype)
    q, scale = quantize_rows(x, row_format, impl=impl)
    expected, expected_scale = reference(x, row_format)
    assert q.dtype == expected.dtype
    torch.testing.assert_close(scale, expected_scale)
    # A quotient computed another way may fall on the other side of a rounding boundary.
    step = 32 if row_format == "fp8" else 1
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
def test_every_instruction_set(isa, size, dtype):
    x = (5 * torch.randn(7, size)).to(dtype)
    q, scale = quantize_rows(x, impl="cpu")
    expected, expected_scale = reference(x, "int8")
    torch.testing.assert_close(scale, expected_scale)
    assert torch.equal(q, expected)


@pytest.mark.parametrize("size", [1, 6, 20, 24, 48, 96, 192, 576, 1536])
def test_rotated_rows_of_every_instruction_set(isa, size):
    torch.manual_seed(0)
    x = 5 * torch.randn(7, size)
    check_quantized(quantize_rows(x, ROTATED, impl="cpu"), reference(x, ROTATED))


@pytest.mark.parametrize("size", [1, 6, 48, 576])
def test_a_rotation_is_orthogonal_and_undone_by_itself(size):
    x = torch.randn(5, size, dtype=torch.float64)
    rotated = rotate_rows(x)
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(rotate_rows(rotated), x)
    assert (size % 2 == 0) != torch.equal(rotated, x)


def test_a_rotation_spreads_what_stands_out():
    x = torch.zeros(1, 192)
    x[0, 5] = 8.0
    assert rotate_rows(x).unique().tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("at", [0, 3, 97])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_has_such_a_scale(isa, bad, at):
    x = torch.randn(3, 100)
    x[1, at] = bad
    assert quantize_rows(x, impl="cpu")[1].isfinite().tolist() == [True, False, True]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("size", [1, 63, 1000])
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_in_the_scale(bad, size, row_format, device, impl):
    torch.manual_seed(0)
    x = torch.randn(3, size, device=device)
    x[1, size // 2] = bad
    _, scale = quantize_rows(x, row_format, impl=impl)
    assert scale.isfinite().tolist() == [True, False, True]
    if row_format != ROTATED:  # by which an infinity meets itself
        assert scale.isnan().tolist() == [False, bad != bad, False]
    _, expected = reference(x[::2], row_format)
    torch.testing.assert_close(scale[::2], expected)


def test_the_cpu_refuses_fp8():
    with pytest.raises(gen_fast.ImplementationError, match="'cpu' does not compute 'fp8'"):
        quantize_rows(torch.ones(1, 2), "fp8", impl="cpu")


@pytest.mark.parametrize("op", [OP, NORM, SWIGLU], ids=lambda op: op.name)
def test_triton_leaves_fp8_to_others_before_sm_89(op, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for oldest, chosen in ((80, False), (86, False), (89, True), (90, True)):
        monkeypatch.setattr(op, "_choices", {})
        monkeypatch.setattr(gpu, "_capability", lambda index, oldest=oldest: (oldest, 90)[index])
        assert (op.choose("cuda", torch.bfloat16, "fp8").name == "triton") == chosen
        assert op.choose("cuda", torch.bfloat16, "int8").name == "triton"
        if not chosen:
            message = f"'triton' needs sm_89 for fp8, not sm_{oldest}"
            with pytest.raises(gen_fast.ImplementationError, match=message):
                op.choose("cuda", torch.bfloat16, "fp8", impl="triton")


def test_an_unknown_format_is_refused():
    with pytest.raises(gen_fast.OpError, match="int8, fp8, int8-rotated, not to 'int3'"):
        quantize_rows(torch.ones(1, 2), "int3")


def test_opcheck():
    for row_format in FORMATS:
        opcheck(OP.torch_op, (torch.randn(3, 8), row_format))
