"""Schemas, gradient and choice of implementation for norm."""

from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, CUDA, REFERENCE, TRITON, Case, Op, gpu, native
from gen_fast.ops.qlinear import ROTATED, check_format, cpp_supports, fake_quantized

from . import reference


def _check(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *row_format: str) -> None:
    if x.shape != residual.shape or x.shape[-1:] != weight.shape:
        raise OpError(
            f"x {list(x.shape)}, residual {list(residual.shape)} and weight {list(weight.shape)}"
            " do not fit together"
        )
    if not x.dtype == residual.dtype == weight.dtype:
        raise OpError(
            f"x, residual and weight must have one dtype, not {x.dtype}, {residual.dtype},"
            f" {weight.dtype}"
        )
    if row_format:
        check_format(*row_format)


BACKWARD = Op(
    "norm_backward",
    "(Tensor grad_normed, Tensor grad_total, Tensor total, Tensor weight, float eps) -> Tensor",
    lambda grad_normed, grad_total, total, weight, eps: total.new_empty(total.shape),
)
OP = Op(
    "norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    BACKWARD,
    _check,
)
QUANTIZED = Op(
    "norm_quantized",
    "(Tensor x, Tensor residual, Tensor weight, float eps, str row_format)"
    " -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps, row_format: (
        *fake_quantized(x, row_format),
        x.new_empty(x.shape),
    ),
    check=_check,
    option=lambda x, residual, weight, eps, row_format: row_format,
)
OP.register(REFERENCE)(reference.add_rms_norm)
BACKWARD.register(REFERENCE)(reference.add_rms_norm_backward)
QUANTIZED.register(REFERENCE)(reference.add_rms_norm_quantized)


# Registered before Triton's, so chosen only when asked for: which of the two is ahead has not been
# measured yet.
@OP.register(CUDA, native.cuda)
def _cuda(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    x, residual, weight = map(native.aligned, (x, residual, weight))
    total = residual if inplace else torch.empty_like(residual)
    out = torch.empty_like(total)
    if out.numel():
        compiled, stream = native.cuda_module(), native.stream(x)
        store = compiled.Store.plain
        compiled.add_rms_norm(
            x.dtype, store, x, residual, weight, total, out, None, *out.shape, eps, stream
        )
    return out, total


def _cuda_supports(case: Case) -> str | None:
    return native.cuda(case) or ("does not rotate rows" if case.option == ROTATED else None)


@QUANTIZED.register(CUDA, _cuda_supports)
def _cuda_quantized(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, row_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, weight = map(native.aligned, (x, residual, weight))
    total = torch.empty_like(residual)
    out, scales = fake_quantized(x, row_format)
    if out.numel():
        compiled, stream = native.cuda_module(), native.stream(x)
        store = getattr(compiled.Store, row_format)
        compiled.add_rms_norm(
            x.dtype, store, x, residual, weight, total, out, scales, *out.shape, eps, stream
        )
    return out, scales, total


OP.register(TRITON, gpu.supports)(gpu.deferred("norm.triton_kernel", "add_rms_norm"))
BACKWARD.register(TRITON, gpu.supports)(gpu.deferred("norm.triton_kernel", "add_rms_norm_backward"))


QUANTIZED.register(TRITON, gpu.supports)(
    gpu.deferred("norm.triton_kernel", "add_rms_norm_quantized")
)


@OP.register(CPP, native.cpp)
def _cpu(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous()
    total = residual if inplace else torch.empty_like(residual)
    out = torch.empty_like(total)
    size = out.size(-1)
    rows = out.numel() // max(1, size)
    native.module().add_rms_norm(x.dtype, x, residual, weight, total, out, rows, size, eps)
    return out, total


@QUANTIZED.register(CPP, cpp_supports)
def _cpu_quantized(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, row_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous()
    total = torch.empty_like(residual)
    out, scales = fake_quantized(x, row_format)
    rotated = row_format == ROTATED
    native.module().add_rms_norm_quantized(
        x.dtype, x, residual, weight, total, out, scales, *out.shape, eps, rotated
    )
    return out, scales, total


@BACKWARD.register(CPP, native.cpp)
def _cpu_backward(
    grad_normed: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, eps: float
) -> Tensor:
    grad_normed, grad_total = grad_normed.contiguous(), grad_total.contiguous()
    total, weight = total.contiguous(), weight.contiguous()
    out = torch.empty_like(total)
    size = out.size(-1)
    rows = out.numel() // max(1, size)
    native.module().add_rms_norm_backward(
        out.dtype, grad_normed, grad_total, total, weight, out, rows, size, eps
    )
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _gradient(
    ctx: Any, grad_normed: Tensor, grad_total: Tensor
) -> tuple[Tensor, Tensor, None, None]:
    total, weight = ctx.saved_tensors
    grad = BACKWARD.in_backward(ctx, grad_normed, grad_total, total, weight, ctx.eps)
    return grad, grad, None, None


OP.differentiate(_save, _gradient)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension of `x` [T, h] with `weight` [h]. Same dtype as `x`.

    torch's own, which is one fused kernel on every device: there is no residual to save.
    Source: Zhang & Sennrich, arXiv 1910.07467, eq. 4.
    """
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    inplace: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum for the next block.

    x, residual [T, h], weight [h], one dtype. Returns (rms_norm(x + residual), x + residual).
    inplace: the sum may be written into `residual`. The weight is frozen: it gets no gradient.
    Raises OpError for shapes or dtypes that do not fit.
    """
    result: tuple[Tensor, Tensor] = OP(x, residual, weight, eps, impl=impl, inplace=inplace)
    return result


def add_rms_norm_quantized(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: str = "int8",
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` whose normed rows are quantised in the same pass. No gradient.

    Returns (q [T, h], scale [T] float32, x + residual); see `qlinear.quantize_rows`.
    """
    result: tuple[Tensor, Tensor, Tensor] = QUANTIZED(x, residual, weight, eps, dtype, impl=impl)
    return result
