"""Schemas, gradient and choice of implementation for swiglu."""

from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Op, gpu, native
from gen_fast.ops.qlinear import ROTATED, check_format, cpp_supports, fake_quantized

from . import reference


def _check(gate_up: Tensor, *row_format: str) -> None:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise OpError(f"gate and up are halves of rows, not of shape {list(gate_up.shape)}")
    if row_format:
        check_format(*row_format)


def _fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


BACKWARD = Op(
    "swiglu_backward",
    "(Tensor grad, Tensor gate_up) -> Tensor",
    lambda grad, gate_up: torch.empty_like(gate_up, memory_format=torch.contiguous_format),
)
OP = Op("swiglu", "(Tensor gate_up) -> Tensor", _fake, BACKWARD, _check)
QUANTIZED = Op(
    "swiglu_quantized",
    "(Tensor gate_up, str row_format) -> (Tensor, Tensor)",
    lambda gate_up, row_format: fake_quantized(_fake(gate_up), row_format),
    check=_check,
    option=lambda gate_up, row_format: row_format,
)
OP.register(REFERENCE)(reference.swiglu)
BACKWARD.register(REFERENCE)(reference.swiglu_backward)
QUANTIZED.register(REFERENCE)(reference.swiglu_quantized)


OP.register(TRITON, gpu.supports)(gpu.deferred("swiglu.triton_kernel", "swiglu"))
BACKWARD.register(TRITON, gpu.supports)(gpu.deferred("swiglu.triton_kernel", "swiglu_backward"))


QUANTIZED.register(TRITON, gpu.supports)(gpu.deferred("swiglu.triton_kernel", "swiglu_quantized"))


@OP.register(CPP, native.cpp)
def _cpu(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    native.module().swiglu(out.dtype, gate_up, out, rows, size)
    return out


@QUANTIZED.register(CPP, cpp_supports)
def _cpu_quantized(gate_up: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    gate_up = gate_up.contiguous()
    out, scales = fake_quantized(_fake(gate_up), row_format)
    native.module().swiglu_quantized(
        gate_up.dtype, gate_up, out, scales, *out.shape, row_format == ROTATED
    )
    return out, scales


@BACKWARD.register(CPP, native.cpp)
def _cpu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    out = torch.empty_like(gate_up)
    native.module().swiglu_backward(out.dtype, grad, gate_up, out, *grad.shape)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    return (BACKWARD.in_backward(ctx, grad, *ctx.saved_tensors),)


OP.differentiate(_save, _gradient)


def swiglu(gate_up: Tensor, *, impl: str | None = None) -> Tensor:
    """silu(gate) · up for `gate_up` [T, 2f], gate first. Returns [T, f] in the same dtype.

    Raises OpError for another shape.

    Source: Shazeer, arXiv 2002.05202, eq. 6.
    """
    result: Tensor = OP(gate_up, impl=impl)
    return result


def swiglu_quantized(
    gate_up: Tensor, dtype: str = "int8", *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """`swiglu` whose rows are quantised in the same pass, for the down projection. No gradient.

    Returns what `qlinear.quantize_rows` would of the unrounded result: ([T, f], [T] float32).
    """
    result: tuple[Tensor, Tensor] = QUANTIZED(gate_up, dtype, impl=impl)
    return result
