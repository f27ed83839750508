"""Weights in groups and products with them: of qlinear, beside its rows."""

import gguf
import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.qlinear import (
    INT4,
    INT8_GROUP,
    dequantize_groups,
    fits_groups,
    group_blocks_shape,
    group_linear,
    group_linear_backward,
    quantize_groups,
)
from gen_fast.ops.qlinear.groups_op import weight_matrix
from gen_fast.testing import assert_no_worse

OP = INT4  # whose implementations are those of the other
DTYPES = [torch.float32, torch.bfloat16]
# (out, in): a block, odd numbers of blocks both ways, more than one task of outputs.
SHAPES = [(16, 32), (48, 96), (80, 1056), (112, 576)]


@pytest.fixture(params=[4, 8])
def bits(request):
    return request.param


def reference_of(q_type: gguf.GGMLQuantizationType, weight: torch.Tensor) -> torch.Tensor:
    """What GGUF makes of a weight, by its own package."""
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), q_type), q_type))


def on_grid_of(weight: torch.Tensor, bits: int) -> bool:
    """Whether a weight is its own nearest."""
    return torch.equal(dequantize_groups(quantize_groups(weight, bits), torch.float32), weight)


@pytest.mark.parametrize(
    ("q_type", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8), ("Q4_0", 8), ("Q5_0", 8)]
)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_what_was_on_a_grid_of_ggufs_keeps_its_values(q_type, bits, shift):
    torch.manual_seed(0)
    weight = reference_of(gguf.GGMLQuantizationType[q_type], torch.randn(64, 256) + shift)
    weight[3] = 0  # a group of one value has no step
    weight[5, :32] = 0.25
    assert on_grid_of(weight, bits)


@pytest.mark.parametrize("shape", [(0, 64), (16, 0), (0, 0)])
def test_a_weight_of_nothing_is_blocks_of_nothing(shape, bits):
    blocks = quantize_groups(torch.empty(shape), bits)
    assert blocks.shape == group_blocks_shape(shape, bits)
    assert dequantize_groups(blocks, torch.float32).shape == shape


def scales_of(count: int, half: int) -> torch.Tensor:
    """Any float16 of which `half` times as much is one too; half of them subnormal."""
    every = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    every = every[every.isfinite() & (every * half).isfinite()]
    small = every[every.abs() < torch.finfo(torch.float16).smallest_normal]
    return torch.cat([x[torch.randint(len(x), (count // 2,))] for x in (every, small)])


@pytest.mark.parametrize("reach", [1.0, 0.5, 0.1])
def test_whatever_the_scale_of_symmetric_groups_is_it_is_found(bits, reach):
    """Also where the furthest value is not as many steps away as GGUF would have put it."""
    torch.manual_seed(0)
    half = 2 ** (bits - 1)
    scale = scales_of(16 * 2048, half).float().view(16, 2048, 1)
    steps = torch.randint(-half, half, (16, 2048, 32)) * reach ** torch.rand(16, 2048, 1)
    assert on_grid_of((scale * steps.round()).flatten(1), bits)


def test_symmetric_groups_with_opposite_ends():
    """Whose step is not on the grid of half of it: that ends at -128 and 127."""
    weight = torch.zeros(16, 64)
    weight[:, 0], weight[:, 1], weight[:, 2] = 64.0, -64.0, 5.0
    weight[:, 32] = 128.0  # at step -128 of a scale of -1
    assert on_grid_of(weight * 2047 / 2**20, 8)


def test_scales_that_float16_does_not_hold_often_enough_are_rounded():
    weight = torch.full((16, 32), 512.0 * 127)
    weight[:, 1::2] = 512.0
    error = (dequantize_groups(quantize_groups(weight, 8), torch.float32) - weight).abs().max()
    assert 0 < error <= 512.0 / 2


@pytest.mark.parametrize(("bits", "q_types"), [(4, ["Q4_0", "Q4_1"]), (8, ["Q8_0"])])
def test_is_nearer_than_ggufs(bits, q_types):
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    error = (dequantize_groups(quantize_groups(weight, bits), torch.float32) - weight).norm()
    for q_type in q_types:
        assert error <= (reference_of(gguf.GGMLQuantizationType[q_type], weight) - weight).norm()


def k_type(weight: torch.Tensor, q_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and steps of weights in a K type of GGUF: scales of groups are 6 or 8 bits of another.

    The gguf package reads these types and does not write them; values are as it computes them.
    """
    if q_type == "Q6_K":  # groups of 16, no minimum
        groups = weight.view(-1, 16, 16)
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -32
        unit = (scale.abs().amax(1, keepdim=True) / 127).half().float()
        step = unit * (scale / unit).round()
        values = step * (groups / step).round().clamp(-32, 31)
    else:
        groups, largest = weight.view(-1, 8, 32), {"Q4_K": 15, "Q5_K": 31}[q_type]
        least = groups.amin(-1, keepdim=True)
        scale = (groups.amax(-1, keepdim=True) - least) / largest
        unit = (scale.amax(1, keepdim=True) / 63).half().float()
        low_unit = (-least.amin(1, keepdim=True) / 63).half().float()
        step, low = unit * (scale / unit).round(), low_unit * (-least / low_unit).round()
        values = step * ((groups + low) / step).round().clamp(0, largest) - low
    return values.view_as(weight), step.abs().expand_as(groups).reshape(weight.shape)


@pytest.mark.parametrize(
    ("q_type", "bits", "lost"),
    [("Q4_K", 4, 0.005), ("Q4_K", 8, 0.005), ("Q5_K", 8, 0.05), ("Q6_K", 8, 0.1)],
)
def test_what_ggufs_k_types_lose(q_type, bits, lost):
    """In steps of their own, root mean square; docs/quantisation.md."""
    torch.manual_seed(0)
    weight, step = k_type(torch.randn(512, 1024), q_type)
    error = dequantize_groups(quantize_groups(weight, bits), torch.float32) - weight
    assert (error / step).square().mean().sqrt() <= lost


def test_takes_a_bit_a_weight_more(bits):
    blocks = quantize_groups(torch.randn(96, 64), bits)
    assert blocks.shape == (6, 2, {4: 320, 8: 576}[bits])
    assert blocks.nbytes * 8 == (bits + 1) * 96 * 64


def test_which_sizes_fit():
    assert fits_groups((32, 64))
    assert not fits_groups((24, 64))
    assert not fits_groups((32, 48))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 5, 6, 13])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(bits, dtype, rows, shape, biased, device, impl):
    torch.manual_seed(0)
    out, inputs = shape
    x = torch.randn(rows, inputs, device=device).to(dtype)
    blocks = quantize_groups(torch.randn(shape) / inputs**0.5, bits).to(device)
    bias = torch.randn(out, device=device).to(dtype) if biased else None
    exact = torch.nn.functional.linear(
        x.double(),
        dequantize_groups(blocks, torch.float64),
        None if bias is None else bias.double(),
    )
    reference = group_linear(x, blocks, bias, impl="reference")
    assert_no_worse(group_linear(x, blocks, bias, impl=impl), reference, exact)


def test_many_outputs_take_one_tile_for_every_number_of_rows():
    pytest.importorskip("triton")
    from gen_fast.ops.qlinear.triton_groups import tiles

    assert {tiles(rows, 24576)[0].blocks["BLOCK_T"] for rows in (1, 16, 17, 64)} == {64}
    assert [tiles(rows, 6144)[0].blocks["BLOCK_T"] for rows in (1, 16, 17, 64)] == [16, 16, 64, 64]


# Both of Triton's tiles; the last rows are more than are multiplied by blocks.
@pytest.mark.parametrize("rows", [1, 17, 64, 65])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_several_tiles(bits, dtype, wide, rows, device, impl, monkeypatch):
    if impl == "cpu" and dtype == torch.float16:
        pytest.skip("takes no float16")
    if impl == "triton" and wide:
        monkeypatch.setattr("gen_fast.ops.qlinear.triton_groups._NARROW_OUTPUTS", 0)
    torch.manual_seed(0)
    x, bias = torch.randn(rows, 160, device=device).to(dtype), torch.randn(144, device=device)
    bias = bias.to(dtype)
    blocks = quantize_groups(torch.randn(144, 160) / 12, bits).to(device)
    weight = dequantize_groups(blocks, torch.float64)
    exact = torch.nn.functional.linear(x.double(), weight, bias.double())
    reference = group_linear(x, blocks, bias, impl="reference")
    assert_no_worse(group_linear(x, blocks, bias, impl=impl), reference, exact)


def test_values_of_a_bias_need_not_be_adjacent(bits, device, impl):
    torch.manual_seed(0)
    x = torch.randn(5, 96, device=device)
    blocks = quantize_groups(torch.randn(48, 96), bits).to(device)
    bias = torch.randn(48, 2, device=device)[:, 0]
    expected = group_linear(x, blocks, bias.contiguous(), impl=impl)
    assert torch.equal(group_linear(x, blocks, bias, impl=impl), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_matrix_that_triton_makes_is_the_references(bits, dtype, device, impl):
    if impl != "triton":
        pytest.skip("makes it otherwise")
    from gen_fast.ops.qlinear.triton_groups import group_weight

    torch.manual_seed(0)
    blocks = quantize_groups(torch.randn(80, 1056), bits).to(device)
    weight, expected = group_weight(blocks, dtype), dequantize_groups(blocks, dtype)
    # A fused multiply-add rounds once where the reference rounds twice.
    torch.testing.assert_close(weight, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(bits, dtype, shape, device, grad_impl):
    torch.manual_seed(0)
    out, inputs = shape
    x = torch.randn(7, inputs, device=device).to(dtype).requires_grad_()
    blocks = quantize_groups(torch.randn(shape) / inputs**0.5, bits).to(device)
    grad = torch.randn(7, out, device=device).to(dtype)
    group_linear(x, blocks, impl=grad_impl).backward(grad)
    exact = grad.double() @ dequantize_groups(blocks, torch.float64)
    assert_no_worse(x.grad, group_linear_backward(grad, blocks, impl="reference"), exact)


@pytest.mark.parametrize("inputs", [576, 2080])  # the latter in two pieces
@pytest.mark.parametrize("rows", [1, 6, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(bits, isa, dtype, rows, inputs):
    torch.manual_seed(0)
    x = torch.randn(rows, inputs).to(dtype)
    blocks = quantize_groups(torch.randn(112, inputs) / inputs**0.5, bits)
    exact = x.double() @ dequantize_groups(blocks, torch.float64).T
    reference = group_linear(x, blocks, impl="reference")
    assert_no_worse(group_linear(x, blocks, impl="cpu"), reference, exact)
    weight = weight_matrix(blocks, dtype)
    assert torch.equal(weight.T, dequantize_groups(blocks, dtype))


def test_many_rows_are_multiplied_by_a_matrix(bits, monkeypatch):
    from gen_fast.ops.qlinear import groups_op

    monkeypatch.setattr(groups_op, "rows_for_a_matrix", lambda dtype: 3)
    blocks, bias = quantize_groups(torch.randn(48, 64), bits), torch.randn(48)
    x = torch.randn(4, 64)
    torch.testing.assert_close(
        group_linear(x, blocks, bias, impl="cpu"), group_linear(x, blocks, bias, impl="reference")
    )
    torch.testing.assert_close(
        group_linear(x, blocks, impl="cpu"), group_linear(x, blocks, impl="reference")
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bits, bad, device, impl):
    x = torch.ones(14, 64, device=device)
    x[7, 40] = bad
    y = group_linear(x, quantize_groups(torch.randn(48, 64), bits).to(device), impl=impl)
    assert y.isfinite().all(1).tolist() == [row != 7 for row in range(14)]


def test_rows_need_not_be_adjacent(bits, device, impl):
    x = torch.randn(5, 128, device=device)
    blocks = quantize_groups(torch.randn(48, 64), bits).to(device)
    expected = group_linear(x[:, :64].contiguous(), blocks, impl=impl)
    torch.testing.assert_close(group_linear(x[:, :64], blocks, impl=impl), expected)


@pytest.mark.parametrize(
    ("x", "blocks", "bias", "message"),
    [
        (torch.ones(2, 32), torch.zeros(1, 2, 320, dtype=torch.uint8), None, r"\[16, 64\]"),
        (torch.ones(32), torch.zeros(1, 1, 320, dtype=torch.uint8), None, r"\[16, 32\]"),
        (torch.ones(2, 32), torch.zeros(1, 1, 256, dtype=torch.uint8), None, "320, 576"),
        (torch.ones(2, 32), torch.zeros(1, 1, 320), None, "4 bits in groups is uint8"),
        (torch.ones(2, 32), torch.zeros(1, 1, 576), None, "8 bits in groups is uint8"),
        (torch.ones(2, 32), torch.zeros(1, 1, 320, dtype=torch.uint8), torch.ones(8), "bias"),
        (
            torch.ones(2, 32),
            torch.zeros(1, 1, 320, dtype=torch.uint8),
            torch.ones(16).half(),
            "float16",
        ),
    ],
)
def test_what_does_not_fit_is_refused(x, blocks, bias, message):
    with pytest.raises(gen_fast.OpError, match=message):
        group_linear(x, blocks, bias)


def test_blocks_of_other_bits_are_refused():
    blocks = torch.zeros(1, 1, 320, dtype=torch.uint8)
    with pytest.raises(gen_fast.OpError, match="8 bits in groups"):
        INT8_GROUP(torch.ones(2, 32), blocks, None)


def test_a_gradient_that_does_not_fit_is_refused():
    with pytest.raises(gen_fast.OpError, match=r"\[16, 32\]"):
        group_linear_backward(torch.ones(2, 8), torch.zeros(1, 1, 320, dtype=torch.uint8))


def test_opcheck(bits):
    blocks = quantize_groups(torch.randn(32, 64), bits)
    op = {4: INT4, 8: INT8_GROUP}[bits]
    opcheck(op.torch_op, (torch.randn(3, 64, requires_grad=True), blocks, torch.randn(32)))
    opcheck(op.backward.torch_op, (torch.randn(3, 32), blocks))
