import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.norm import (
    BACKWARD,
    OP,
    QUANTIZED,
    add_rms_norm,
    add_rms_norm_quantized,
    rms_norm,
)
from gen_fast.ops.norm.reference import add_rms_norm as reference
from gen_fast.ops.qlinear import ROTATED, rotate_rows
from gen_fast.testing import assert_no_worse, check_gradients, check_quantized

SHAPES = [(0, 48), (1, 1), (1, 63), (7, 576), (33, 1000)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm_matches_float64(shape, dtype, inplace, device, impl):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(device, dtype)
    weight = torch.randn(shape[1]).to(device, dtype)
    exact = reference(x.double(), residual.double(), weight.double(), 1e-5)
    plain = reference(x, residual, weight, 1e-5)
    kept = residual.clone()
    actual = add_rms_norm(x, residual, weight, 1e-5, inplace=inplace, impl=impl)
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_no_worse(a, p, e)
    assert inplace or torch.equal(residual, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape, dtype, device, grad_impl):
    torch.manual_seed(0)
    x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(shape[1]).to(dtype)

    def run(x, residual, weight, **options):
        return add_rms_norm(x, residual, weight, 1e-5, **options)

    def plain(x, residual, weight):
        return reference(x, residual, weight, 1e-5)

    check_gradients(run, plain, (x, residual, weight), grad_impl, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8192, 9000, 40_001, 65_536])
def test_long_rows(size, dtype, device, impl):
    test_add_rms_norm_matches_float64((2, size), dtype, False, device, impl)


def test_non_contiguous_input(device, impl):
    x, residual = torch.randn(2, 10, 96, device=device)[:, :, ::2]
    weight = torch.ones(48, device=device)
    expected = reference(x, residual, weight, 1e-6)
    for inplace in (False, True):
        actual = add_rms_norm(x, residual, weight, 1e-6, inplace=inplace, impl=impl)
        torch.testing.assert_close(actual, expected)
        residual = residual.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 250, 576, 1000])
def test_quantised_rows_are_those_of_the_unrounded_norm(
    row_format, size, dtype, with_carry, device, quantized_impl
):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, size).to(device, dtype)
    weight = torch.randn(size).to(device, dtype)
    q, scale, total = add_rms_norm_quantized(
        x, residual, weight, 1e-5, row_format, impl=quantized_impl
    )
    normed, expected = reference(x.double(), residual.double(), weight.double(), 1e-5)
    assert_no_worse(total, x + residual, expected)
    scale = scale.unsqueeze(-1)
    expected = rotate_rows(normed) if row_format == ROTATED else normed
    restored = with_carry(q, expected / scale.where(scale > 0, 1.0)) * scale
    step = scale * (16.1 if row_format == "fp8" else 0.51)
    # The norm is that of the stored, rounded stream.
    rounding = (
        0.02 * (expected.norm(dim=1, keepdim=True) if row_format == ROTATED else normed).abs()
    )
    assert ((restored - expected).abs() <= step + rounding).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("size", [63, 1000])
def test_nan_is_in_the_scale_of_its_row(size, row_format, device, quantized_impl):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, size, device=device)
    weight = torch.ones(size, device=device)
    x[1, size // 2] = float("nan")
    results = add_rms_norm_quantized(x, residual, weight, 1e-5, row_format, impl=quantized_impl)
    assert results[1].isnan().tolist() == [False, True, False]
    # The weight's own: then the norm of all rows but one element is a number.
    x[1], weight[7] = 1.0, float("nan")
    results = add_rms_norm_quantized(x, residual, weight, 1e-5, row_format, impl=quantized_impl)
    assert results[1].isnan().all()


def test_rms_norm_of_a_constant_row_is_the_weight():
    weight = torch.randn(16)
    torch.testing.assert_close(
        rms_norm(torch.full((2, 16), 3.0), weight, 0.0), weight.expand(2, 16)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set(isa, shape, dtype):
    test_add_rms_norm_matches_float64(shape, dtype, True, "cpu", "cpu")
    test_gradient(shape, dtype, "cpu", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 63, 576, 1000])
def test_quantised_rows_of_every_instruction_set(isa, size, dtype):
    torch.manual_seed(0)
    x, residual, weight = *torch.randn(2, 7, size).to(dtype), torch.randn(size).to(dtype)
    check_quantized(
        add_rms_norm_quantized(x, residual, weight, 1e-5, impl="cpu"),
        add_rms_norm_quantized(x, residual, weight, 1e-5, impl="reference"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.ones(3, 8)}, "do not fit"),
        ({"weight": torch.ones(1)}, "do not fit"),
        ({"residual": torch.ones(2, 8).bfloat16()}, "one dtype"),
        ({"weight": torch.ones(8).double()}, "one dtype"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": torch.ones(2, 8), "residual": torch.ones(2, 8), "weight": torch.ones(8)}
    arguments |= change
    with pytest.raises(gen_fast.OpError, match=message):
        add_rms_norm(**arguments, eps=1e-5)
    with pytest.raises(gen_fast.OpError, match=message):
        OP.torch_op(*arguments.values(), 1e-5)


def test_an_unknown_format_is_refused():
    with pytest.raises(gen_fast.OpError, match="not to 'int3'"):
        add_rms_norm_quantized(*torch.ones(2, 2, 8), torch.ones(8), 1e-5, "int3")


def test_opcheck():
    x, residual = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    weight = torch.randn(8)
    opcheck(OP.torch_op, (x, residual, weight, 1e-5))
    plain = (x.detach(), residual.detach())
    opcheck(BACKWARD.torch_op, (*plain, torch.randn(3, 8), weight, 1e-5))
    opcheck(QUANTIZED.torch_op, (*plain, weight, 1e-5, "int8"))
