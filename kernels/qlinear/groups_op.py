"""Schemas, gradient and choice of implementation for products with weights in groups."""

import sys
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Op, gpu, native
from gen_fast.ops.dense import product

from . import groups

# A guess, not measured: no machine with AMX was at hand.
_ROWS_ON_TILES = 64


def _shape_of(blocks: Tensor) -> tuple[int, int]:
    """(out, in) of a weight."""
    return blocks.shape[0] * groups.OUTPUTS, blocks.shape[1] * groups.INPUTS


def _check_blocks(blocks: Tensor, bits: int) -> None:
    size = groups.block_bytes(bits)
    if blocks.dtype != torch.uint8 or blocks.dim() != 3 or blocks.shape[2] != size:
        raise OpError(
            f"a weight of {bits} bits in groups is uint8 [out / 16, in / 32, {size}], not "
            f"{blocks.dtype} {list(blocks.shape)}"
        )


def _group_op(name: str, bits: int) -> Op:
    """The op of weights of so many bits, with its implementations and gradient."""

    def check(x: Tensor, blocks: Tensor, bias: Tensor | None) -> None:
        _check_blocks(blocks, bits)
        out, inputs = _shape_of(blocks)
        if x.dim() != 2 or x.shape[1] != inputs:
            raise OpError(f"x {list(x.shape)} does not go through a weight of [{out}, {inputs}]")
        if bias is not None and (tuple(bias.shape) != (out,) or bias.dtype != x.dtype):
            raise OpError(
                f"a bias for x in {x.dtype} and a weight of [{out}, {inputs}] is not "
                f"{bias.dtype} {list(bias.shape)}"
            )

    def check_backward(grad: Tensor, blocks: Tensor) -> None:
        _check_blocks(blocks, bits)
        out, inputs = _shape_of(blocks)
        if grad.dim() != 2 or grad.shape[1] != out:
            raise OpError(f"grad {list(grad.shape)} is not of a weight of [{out}, {inputs}]")

    backward = Op(
        f"{name}_backward",
        "(Tensor grad, Tensor blocks) -> Tensor",
        lambda grad, blocks: grad.new_empty(len(grad), _shape_of(blocks)[1]),
        check=check_backward,
    )
    op = Op(
        name,
        "(Tensor x, Tensor blocks, Tensor? bias) -> Tensor",
        lambda x, blocks, bias: x.new_empty(len(x), _shape_of(blocks)[0]),
        backward,
        check,
    )

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return backward.in_backward(ctx, grad, ctx.blocks), None, None

    op.register(REFERENCE)(_reference)
    backward.register(REFERENCE)(_backward_reference)
    op.register(TRITON, gpu.supports)(gpu.deferred("qlinear.triton_groups", "group_linear"))
    backward.register(TRITON, gpu.supports)(
        gpu.deferred("qlinear.triton_groups", "group_linear_backward")
    )
    op.register(CPP, native.cpp)(_cpu)
    backward.register(CPP, native.cpp)(_backward_cpu)
    op.differentiate(_save, gradient)
    return op


def _reference(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, groups.dequantize_groups(blocks, x.dtype), bias)


def _backward_reference(grad: Tensor, blocks: Tensor) -> Tensor:
    return grad @ groups.dequantize_groups(blocks, grad.dtype)


def _cpu(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    if len(x) >= rows_for_a_matrix(x.dtype):
        weight = weight_matrix(blocks, x.dtype)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    x, blocks = x.contiguous(), blocks.contiguous()
    bias = None if bias is None else bias.contiguous()
    out, inputs = _shape_of(blocks)
    y = x.new_empty(len(x), out)
    native.module().group_linear(
        x.dtype, groups.bits_of(blocks), x, blocks, bias, y, len(x), inputs, out
    )
    return y


def _backward_cpu(grad: Tensor, blocks: Tensor) -> Tensor:
    return product(grad, weight_matrix(blocks, grad.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.blocks = inputs[1]


def rows_for_a_matrix(dtype: torch.dtype) -> int:
    """From so many rows on oneDNN multiplies, by a matrix that the weight is made for the moment.

    Only where it has tiles for bfloat16, which the C++ op does not use. Which of the two is faster
    elsewhere, for thousands of rows, has not been settled.
    """
    has_tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return _ROWS_ON_TILES if has_tiles else sys.maxsize


def weight_matrix(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """The transpose [in, out] of a weight, by the C++ ops."""
    blocks = blocks.contiguous()
    out, inputs = _shape_of(blocks)
    weight = torch.empty(inputs, out, dtype=dtype)
    native.module().group_weight(dtype, groups.bits_of(blocks), blocks, weight, inputs, out)
    return weight


INT4 = _group_op("int4_linear", 4)
INT8_GROUP = _group_op("int8_group_linear", 8)
_OPS = {4: INT4, 8: INT8_GROUP}


def _op_of(blocks: Tensor) -> Op:
    bits = groups.bits_of(blocks)
    if bits is None:
        raise OpError(
            f"a weight in groups is uint8 [out / 16, in / 32, n], n one of "
            f"{', '.join(map(str, groups.BITS_OF_BLOCKS))}, not {blocks.dtype} {list(blocks.shape)}"
        )
    return _OPS[bits]


def group_linear(
    x: Tensor, blocks: Tensor, bias: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """x [T, in] times a frozen weight in groups, transposed, plus bias [out]: [T, out].

    blocks: uint8 [out / 16, in / 32, 320] of 4 bits or [out / 16, in / 32, 576] of 8, as
    `quantize_groups` gives them. The product is that with `dequantize_groups(blocks, x.dtype)` to
    rounding: an implementation that multiplies in float32 does not round the weights to x's dtype.
    A gradient reaches x alone.

    Raises OpError for shapes and dtypes that do not fit.

    Source: the types Q4_1 and Q8_0 of GGUF (llama.cpp).
    """
    result: Tensor = _op_of(blocks)(x, blocks, bias, impl=impl)
    return result


def group_linear_backward(grad: Tensor, blocks: Tensor, *, impl: str | None = None) -> Tensor:
    """grad [T, out] times the weight of `blocks` [out, in]: the gradient [T, in] of x."""
    backward = _op_of(blocks).backward
    assert backward is not None
    result: Tensor = backward(grad, blocks, impl=impl)
    return result
