import pytest
import torch

from gen_fast.ops.swiglu import OP, swiglu
from gen_fast.ops.swiglu.reference import swiglu as reference
from gen_fast.testing import assert_no_worse


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 126), (17, 3072)])
def test_matches_float64(shape, dtype, impl):
    torch.manual_seed(0)
    gate_up = (8 * torch.randn(shape)).to(dtype)
    assert_no_worse(swiglu(gate_up, impl=impl), reference(gate_up), reference(gate_up.double()))


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
def test_extreme_gates_neither_overflow_nor_turn_nan(impl):
    gate_up = torch.tensor([[-1e4, -88.0, 0.0, 88.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor([[0.0, 0.0, 0.0, 88.0, 1e4]])
    torch.testing.assert_close(swiglu(gate_up, impl=impl), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(isa_level, dtype):
    for shape in ((3, 126), (17, 3072)):
        test_matches_float64(shape, dtype, "cpu")
    test_extreme_gates_neither_overflow_nor_turn_nan("cpu")


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
def test_nan_goes_through(impl):
    gate_up = torch.ones(1, 128)
    gate_up[0, [3, 70]] = float("nan")
    assert swiglu(gate_up, impl=impl).isnan().nonzero()[:, 1].tolist() == [3, 6]
