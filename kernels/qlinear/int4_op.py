"""Schemas, gradient and choice of implementation for products with weights of 4 bits."""

import sys
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Op, gpu, native

from . import int4

# A guess, not measured: no machine with AMX was at hand.
_ROWS_ON_TILES = 64


def _int4_shape(blocks: Tensor) -> tuple[int, int]:
    """(out, in) of a weight."""
    return blocks.shape[0] * int4.OUTPUTS, blocks.shape[1] * int4.INPUTS


def _check_int4_blocks(blocks: Tensor) -> None:
    if blocks.dtype != torch.uint8 or blocks.dim() != 3 or blocks.shape[2] != int4.BLOCK_BYTES:
        raise OpError(
            f"a weight of 4 bits is uint8 [out / 16, in / 32, {int4.BLOCK_BYTES}], not "
            f"{blocks.dtype} {list(blocks.shape)}"
        )


def _check_int4(x: Tensor, blocks: Tensor, bias: Tensor | None) -> None:
    _check_int4_blocks(blocks)
    out, inputs = _int4_shape(blocks)
    if x.dim() != 2 or x.shape[1] != inputs:
        raise OpError(f"x {list(x.shape)} does not go through a weight of [{out}, {inputs}]")
    if bias is not None and (tuple(bias.shape) != (out,) or bias.dtype != x.dtype):
        raise OpError(
            f"a bias for x in {x.dtype} and a weight of [{out}, {inputs}] is not "
            f"{bias.dtype} {list(bias.shape)}"
        )


def _check_int4_backward(grad: Tensor, blocks: Tensor) -> None:
    _check_int4_blocks(blocks)
    out, inputs = _int4_shape(blocks)
    if grad.dim() != 2 or grad.shape[1] != out:
        raise OpError(f"grad {list(grad.shape)} is not of a weight of [{out}, {inputs}]")


INT4_BACKWARD = Op(
    "int4_linear_backward",
    "(Tensor grad, Tensor blocks) -> Tensor",
    lambda grad, blocks: grad.new_empty(len(grad), _int4_shape(blocks)[1]),
    check=_check_int4_backward,
)
INT4 = Op(
    "int4_linear",
    "(Tensor x, Tensor blocks, Tensor? bias) -> Tensor",
    lambda x, blocks, bias: x.new_empty(len(x), _int4_shape(blocks)[0]),
    INT4_BACKWARD,
    _check_int4,
)


@INT4.register(REFERENCE)
def _int4_reference(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, int4.dequantize_weight(blocks, x.dtype), bias)


@INT4_BACKWARD.register(REFERENCE)
def _int4_backward_reference(grad: Tensor, blocks: Tensor) -> Tensor:
    return grad @ int4.dequantize_weight(blocks, grad.dtype)


INT4.register(TRITON, gpu.supports)(gpu.deferred("qlinear.triton_int4", "int4_linear"))
INT4_BACKWARD.register(TRITON, gpu.supports)(
    gpu.deferred("qlinear.triton_int4", "int4_linear_backward")
)


@INT4.register(CPP, native.cpp)
def _int4_cpu(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    if len(x) >= rows_for_a_matrix(x.dtype):
        weight = weight_matrix(blocks, x.dtype)
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    x, blocks = x.contiguous(), blocks.contiguous()
    out, inputs = _int4_shape(blocks)
    y = x.new_empty(len(x), out)
    native.module().int4_linear(
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        blocks.data_ptr(),
        native.address(None if bias is None else bias.contiguous()),
        y.data_ptr(),
        len(x),
        inputs,
        out,
    )
    return y


@INT4_BACKWARD.register(CPP, native.cpp)
def _int4_backward_cpu(grad: Tensor, blocks: Tensor) -> Tensor:
    return grad @ weight_matrix(blocks, grad.dtype).T


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
    out, inputs = _int4_shape(blocks)
    weight = torch.empty(inputs, out, dtype=dtype)
    native.module().int4_weight(
        dtype == torch.bfloat16, blocks.data_ptr(), weight.data_ptr(), inputs, out
    )
    return weight


def _save_int4(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.blocks = inputs[1]


def _int4_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return INT4_BACKWARD.in_backward(ctx, grad, ctx.blocks), None, None


INT4.differentiate(_save_int4, _int4_gradient)


def int4_linear(
    x: Tensor, blocks: Tensor, bias: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """x [T, in] times a frozen weight of 4 bits, transposed, plus bias [out]: [T, out].

    blocks: uint8 [out / 16, in / 32, 320], as `quantize_weight` gives them. The product is that
    with `dequantize_weight(blocks, x.dtype)` to rounding: an implementation that multiplies in
    float32 does not round the weights to x's dtype. A gradient reaches x alone.
    Raises OpError for shapes and dtypes that do not fit.

    Source: the type Q4_1 of GGUF (llama.cpp).
    """
    result: Tensor = INT4(x, blocks, bias, impl=impl)
    return result


def int4_linear_backward(grad: Tensor, blocks: Tensor, *, impl: str | None = None) -> Tensor:
    """grad [T, out] times the weight of `blocks` [out, in]: the gradient [T, in] of x."""
    result: Tensor = INT4_BACKWARD(grad, blocks, impl=impl)
    return result
