import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.qlinear import ROTATED, rotate_rows
from gen_fast.ops.swiglu import BACKWARD, OP, QUANTIZED, swiglu, swiglu_quantized
from gen_fast.ops.swiglu.reference import swiglu as reference
from gen_fast.testing import assert_no_worse, check_gradients, check_quantized

SHAPES = [(0, 8), (1, 2), (3, 126), (17, 3072)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, dtype, device, impl):
    torch.manual_seed(0)
    gate_up = (8 * torch.randn(shape)).to(device, dtype)
    assert_no_worse(swiglu(gate_up, impl=impl), reference(gate_up), reference(gate_up.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, dtype, device, grad_impl):
    torch.manual_seed(0)
    gate_up = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    check_gradients(swiglu, reference, (gate_up,), grad_impl, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 250, 2000, 3072])
def test_quantised_rows_are_those_of_the_unrounded_result(
    row_format, size, dtype, with_carry, device, quantized_impl
):
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(5, size)).to(device, dtype)
    gate_up[2] = 0
    q, scale = swiglu_quantized(gate_up, row_format, impl=quantized_impl)
    exact = reference(gate_up.double())
    if row_format == ROTATED:
        exact = rotate_rows(exact)
    scale = scale.unsqueeze(-1)
    restored = with_carry(q, exact / scale.where(scale > 0, 1.0)) * scale
    step = scale * (16.1 if row_format == "fp8" else 0.51)
    assert ((restored - exact).abs() <= step + 1e-6).all()
    assert not q[2].float().any()


def test_non_contiguous_input(device, impl):
    gate_up = torch.randn(6, 80, device=device)[::2, 8:72]
    torch.testing.assert_close(swiglu(gate_up, impl=impl), reference(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy's, in Triton's interpreter
def test_extreme_gates_neither_overflow_nor_turn_nan(device, impl):
    gates = [-1e4, -88.0, 0.0, 88.0, 1e4]
    gate_up = torch.tensor([gates * 8 + [1.0] * 40], device=device)
    expected = torch.tensor([[0.0, 0.0, 0.0, 88.0, 1e4] * 8], device=device)
    torch.testing.assert_close(swiglu(gate_up, impl=impl), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(isa, dtype):
    for shape in SHAPES[2:]:
        test_matches_float64(shape, dtype, "cpu", "cpu")
        test_gradient(shape, dtype, "cpu", "cpu")
    test_extreme_gates_neither_overflow_nor_turn_nan("cpu", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 126, 3072])
def test_quantised_rows_of_every_instruction_set(isa, size, dtype):
    torch.manual_seed(0)
    gate_up = (4 * torch.randn(7, size)).to(dtype)
    check_quantized(*(swiglu_quantized(gate_up, impl=impl) for impl in ("cpu", "reference")))


@pytest.mark.parametrize("shape", [(3, 7), (8,), (2, 2, 4)])
def test_what_is_no_pair_of_halves_is_refused(shape):
    for call in (swiglu, OP.torch_op, swiglu_quantized):
        with pytest.raises(gen_fast.OpError, match="halves of rows"):
            call(torch.ones(shape))


def test_nan_goes_through(device, impl):
    gate_up = torch.ones(1, 128, device=device)
    gate_up[0, [3, 70]] = float("nan")
    assert swiglu(gate_up, impl=impl).isnan().nonzero()[:, 1].tolist() == [3, 6]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
def test_nan_is_in_the_scale_of_its_row(row_format, device, quantized_impl):
    gate_up = torch.ones(3, 128, device=device)
    gate_up[1, 70] = float("nan")
    _, scale = swiglu_quantized(gate_up, row_format, impl=quantized_impl)
    assert scale.isnan().tolist() == [False, True, False]


def test_opcheck():
    gate_up = torch.randn(3, 8, requires_grad=True)
    opcheck(OP.torch_op, (gate_up,))
    opcheck(BACKWARD.torch_op, (torch.randn(3, 4), gate_up.detach()))
    opcheck(QUANTIZED.torch_op, (gate_up.detach(), "int8"))
