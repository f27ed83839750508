"""Weights in int8 and products with them; what fp8 keeps too: test_qlinear_8_bits.py."""

import pytest
import torch
from products_of_8_bits import INT8
from torch.library import opcheck

import gen_fast
from gen_fast.ops.qlinear import (
    ROTATED,
    WEIGHT,
    fits_int8,
    int8_blocks_shape,
    int8_weight,
    quantize_weight_int8,
    rotate_rows,
    unpack_int8,
)
from gen_fast.testing import assert_no_worse, relative_error

OP = INT8.op


@pytest.mark.parametrize("shape", INT8.shapes)
def test_a_weight_is_quantised_by_output(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[3] = 0
    blocks, scale = quantize_weight_int8(weight)
    q = unpack_int8(blocks)
    assert tuple(blocks.shape) == int8_blocks_shape(shape)
    assert q.abs().amax(1).tolist() == [0 if i == 3 else 127 for i in range(shape[0])]
    assert ((q * scale.unsqueeze(1) - weight).abs() <= 0.501 * scale.unsqueeze(1)).all()


# Of (112, 576) 64 values are rotated together, of the others 4 and 32; the first is one block.
@pytest.mark.parametrize("shape", INT8.shapes)
@pytest.mark.parametrize("dtype", [*INT8.dtypes, torch.float16])
def test_the_weight_as_a_matrix(dtype, shape, device, impl):
    if impl == "cpu" and dtype == torch.float16:
        pytest.skip("gives no float16")
    torch.manual_seed(0)
    weight = torch.randn(shape)
    blocks, scale = quantize_weight_int8(weight, ROTATED)
    exact = rotate_rows(unpack_int8(blocks).double() * scale.double().unsqueeze(1))
    assert relative_error(exact, weight) < 0.01
    inputs = blocks.to(device), scale.to(device)
    reference = int8_weight(*inputs, dtype=dtype, impl="reference")
    assert_no_worse(int8_weight(*inputs, dtype=dtype, impl=impl), reference, exact)


@pytest.mark.parametrize("dtype", INT8.dtypes)
def test_the_matrix_in_every_instruction_set(isa_or_vnni, dtype):
    blocks, scale = quantize_weight_int8(torch.randn(112, 576), ROTATED)
    exact = int8_weight(blocks, scale, dtype=torch.float64)
    reference = int8_weight(blocks, scale, dtype=dtype, impl="reference")
    assert_no_worse(int8_weight(blocks, scale, dtype=dtype, impl="cpu"), reference, exact)


def test_which_sizes_fit():
    assert fits_int8((32, 64))
    assert not fits_int8((24, 64))
    assert not fits_int8((32, 62))
    assert not fits_int8((16, 66_404))  # sums would not fit 32 bits


# Of Triton's tiles each has its rows; the last are more of them than go through a weight together.
@pytest.mark.parametrize("rows", [17, 65, 1100])
def test_rows_of_several_tiles(rows, device, impl):
    inputs = INT8.example(rows, (144, 100), device, biased=True)
    reference = INT8.linear(*inputs, impl="reference")
    assert_no_worse(INT8.linear(*inputs, impl=impl), reference, INT8.exact(*inputs))


def test_results_in_float16(device, impl):
    if impl == "cpu":
        pytest.skip("gives no float16")
    inputs = INT8.example(5, (48, 100), device, torch.float16, biased=True)
    reference = INT8.linear(*inputs, dtype=torch.float16, impl="reference")
    actual = INT8.linear(*inputs, dtype=torch.float16, impl=impl)
    assert_no_worse(actual, reference, INT8.exact(*inputs))


@pytest.mark.parametrize("rows", [1, 6, 70, 300])
@pytest.mark.parametrize("dtype", INT8.dtypes)
def test_every_instruction_set(isa_or_vnni, dtype, rows):
    inputs = INT8.example(rows, (112, 576), dtype=dtype, biased=True)
    reference = INT8.linear(*inputs, dtype=dtype, impl="reference")
    assert_no_worse(INT8.linear(*inputs, dtype=dtype, impl="cpu"), reference, INT8.exact(*inputs))


def largest_values(device="cpu"):
    """Two rows of the largest values and a weight of them, and the two sums."""
    inputs = 9_728
    q = torch.full((2, inputs), 127, dtype=torch.int8, device=device)
    q[1] = -127
    shape = int8_blocks_shape((16, inputs))
    blocks = torch.full(shape, 127, dtype=torch.int8, device=device)
    scale, weight_scale = torch.ones(2, device=device), torch.ones(16, device=device)
    return (q, scale, blocks, weight_scale), [127**2 * inputs, -(127**2) * inputs]


def test_sums_of_the_largest_values_are_exact_in_every_instruction_set(isa_or_vnni):
    arguments, sums = largest_values()
    assert INT8.linear(*arguments, impl="cpu").unique(dim=1).flatten().tolist() == sums


def test_sums_of_the_largest_values_are_exact(device, impl):
    if impl == "reference":
        pytest.skip("adds in float32")
    arguments, sums = largest_values(device)
    assert INT8.linear(*arguments, impl=impl).unique(dim=1).flatten().tolist() == sums


@pytest.mark.parametrize("forced", ["cpu", "triton"])
def test_results_in_float64_are_the_references(forced):
    with pytest.raises(gen_fast.ImplementationError, match=rf"'{forced}' gives no torch\.float64"):
        INT8.linear(*INT8.example(2, (16, 4)), dtype=torch.float64, impl=forced)


def test_scales_of_a_matrix_that_do_not_fit_are_refused():
    blocks, scale = quantize_weight_int8(torch.randn(32, 64), ROTATED)
    with pytest.raises(gen_fast.OpError, match="32 outputs"):
        int8_weight(blocks, scale[1:], dtype=torch.float32)
    with pytest.raises(gen_fast.OpError, match="uint8"):
        int8_weight(blocks.view(torch.uint8), scale, dtype=torch.float32)


def test_opcheck():
    q, scale, *weight, bias = INT8.example(3, (32, 64), biased=True)
    opcheck(OP.torch_op, (q, weight[0], scale, weight[1], bias, torch.float32))
    opcheck(WEIGHT.torch_op, (*weight, torch.float32))
