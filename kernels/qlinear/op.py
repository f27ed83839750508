"""Schemas, gradient and choice of implementation for qlinear."""

import sys
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Case, Op, gpu, native, other_option

from . import int4, reference

# A guess, not measured: no machine with AMX was at hand.
_ROWS_ON_TILES = 64


def cpp_supports(case: Case) -> str | None:
    """Why a C++ op that quantises rows cannot compute `case`, or None."""
    return native.cpp(case) or other_option(case, "int8")


def fake_quantized(x: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    """Empty results of quantising rows of the shape of `x` [T, f]."""
    dtype, _ = reference.FORMATS[row_format]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


def check_format(row_format: str) -> None:
    """Raise OpError unless rows quantise to `row_format`."""
    if row_format not in reference.FORMATS:
        raise OpError(f"rows quantise to {', '.join(reference.FORMATS)}, not to {row_format!r}")


def _check(x: Tensor, row_format: str) -> None:
    check_format(row_format)
    if x.dim() != 2:
        raise OpError(f"rows to quantise are a matrix, not of shape {list(x.shape)}")


OP = Op(
    "quantize_rows",
    "(Tensor x, str row_format) -> (Tensor, Tensor)",
    fake_quantized,
    check=_check,
    option=lambda x, row_format: row_format,
)
OP.register(REFERENCE)(reference.quantize_rows)


OP.register(TRITON, gpu.supports)(gpu.deferred("qlinear.triton_kernel", "quantize_rows"))


@OP.register(CPP, cpp_supports)
def _cpu(x: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    q, scale = fake_quantized(x, row_format)
    native.module().quantize_rows(
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        q.data_ptr(),
        scale.data_ptr(),
        *x.shape,
    )
    return q, scale


def quantize_rows(
    x: Tensor, dtype: str = "int8", *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise each row of `x` [T, f] symmetrically. Returns (q [T, f], scale [T] float32).

    dtype "int8" gives torch.int8 in [-127, 127], rounded to nearest even; "fp8" gives
    torch.float8_e4m3fn. scale = max|row| / 127 (448 for fp8), so x ≈ q · scale. No gradient.
    Norm and swiglu do the same to their own result before it reaches memory.
    Raises OpError for another dtype, or if `x` is no matrix.

    Source: Dettmers et al., arXiv 2208.07339, §2 (row-wise absmax).
    """
    result: tuple[Tensor, Tensor] = OP(x, dtype, impl=impl)
    return result


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
