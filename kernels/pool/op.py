"""Schemas, gradient and choice of implementation for pool."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.functional import normalize as l2_normalize

from gen_fast.errors import OpError
from gen_fast.ops import CPP, CUDA, REFERENCE, TRITON, Op, gpu, native

from . import reference


def _check(
    hidden: Tensor, offsets: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> None:
    if hidden.dim() != 2 or offsets.dim() != 1 or hidden.shape[1:] != norm_weight.shape:
        raise OpError(
            f"hidden {list(hidden.shape)}, offsets {list(offsets.shape)} and norm weight"
            f" {list(norm_weight.shape)} do not fit together"
        )
    if row_weights is not None and row_weights.shape != hidden.shape[:1]:
        raise OpError(f"{hidden.shape[0]} rows need as many weights, not {list(row_weights.shape)}")


BACKWARD = Op(
    "pool_backward",
    "(Tensor hidden, Tensor grad, Tensor offsets, Tensor norm_weight, float eps,"
    " Tensor? row_weights) -> Tensor",
    lambda hidden, *rest: hidden.new_empty(hidden.shape),
)
OP = Op(
    "pool",
    "(Tensor hidden, Tensor offsets, Tensor norm_weight, float eps, Tensor? row_weights) -> Tensor",
    lambda hidden, offsets, norm_weight, eps, row_weights: hidden.new_empty(
        offsets.shape[0] - 1,
        hidden.shape[1],
        dtype=torch.promote_types(hidden.dtype, torch.float32),
    ),
    BACKWARD,
    _check,
)
OP.register(REFERENCE)(reference.pool)
BACKWARD.register(REFERENCE)(reference.pool_backward)


# Registered before Triton's, so chosen only when asked for: which of the two is ahead has not been
# measured yet.
@OP.register(CUDA, native.cuda)
def _cuda(
    hidden: Tensor, offsets: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> Tensor:
    hidden, norm_weight = native.aligned(hidden), native.aligned(norm_weight.to(hidden.dtype))
    offsets = offsets.to(torch.int32).contiguous()
    weights = None if row_weights is None else row_weights.float().contiguous()
    out = hidden.new_empty(len(offsets) - 1, hidden.shape[1], dtype=torch.float32)
    if out.numel():
        native.cuda_module().pool(
            native.cuda_dtype(hidden),
            *map(native.address, (hidden, offsets, norm_weight, weights, out)),
            *(*out.shape, eps, native.stream(hidden)),
        )
    return out


@OP.register(TRITON, gpu.supports)
def _triton(
    hidden: Tensor, offsets: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> Tensor:
    from . import triton_kernel

    return triton_kernel.pool(hidden, offsets, norm_weight, eps, row_weights)


@BACKWARD.register(TRITON, gpu.supports)
def _triton_backward(
    hidden: Tensor,
    grad: Tensor,
    offsets: Tensor,
    norm_weight: Tensor,
    eps: float,
    row_weights: Tensor | None,
) -> Tensor:
    from . import triton_kernel

    return triton_kernel.pool_backward(hidden, grad, offsets, norm_weight, eps, row_weights)


@OP.register(CPP, native.cpp)
def _cpu(
    hidden: Tensor, offsets: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> Tensor:
    hidden, norm_weight = hidden.contiguous(), norm_weight.to(hidden.dtype).contiguous()
    offsets = offsets.to(torch.int32).contiguous()
    weights = None if row_weights is None else row_weights.float().contiguous()
    out = hidden.new_empty(len(offsets) - 1, hidden.shape[1], dtype=torch.float32)
    native.module().pool(
        hidden.dtype == torch.bfloat16,
        *map(native.address, (hidden, offsets, norm_weight, weights, out)),
        *(*out.shape, eps),
    )
    return out


@BACKWARD.register(CPP, native.cpp)
def _cpu_backward(
    hidden: Tensor,
    grad: Tensor,
    offsets: Tensor,
    norm_weight: Tensor,
    eps: float,
    row_weights: Tensor | None,
) -> Tensor:
    hidden, norm_weight = hidden.contiguous(), norm_weight.to(hidden.dtype).contiguous()
    offsets, grad = offsets.to(torch.int32).contiguous(), grad.float().contiguous()
    weights = None if row_weights is None else row_weights.float().contiguous()
    out = hidden.new_zeros(hidden.shape)  # padding rows have no gradient
    native.module().pool_backward(
        hidden.dtype == torch.bfloat16,
        *map(native.address, (grad, hidden, offsets, norm_weight, weights, out)),
        *(*grad.shape, eps),
    )
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, offsets, norm_weight, ctx.eps, row_weights = inputs
    ctx.save_for_backward(hidden, offsets, norm_weight, row_weights)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, offsets, norm_weight, row_weights = ctx.saved_tensors
    result = BACKWARD.torch_op(
        hidden, grad, offsets, norm_weight, ctx.eps, row_weights, impl=ctx.impl
    )
    return result, *(None,) * 4


OP.differentiate(_save, _gradient)


def pool(
    hidden: Tensor,
    offsets: Tensor,
    norm_weight: Tensor,
    eps: float,
    row_weights: Tensor | None = None,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: bool = False,
    *,
    impl: str | None = None,
) -> Tensor:
    """Turn the needed rows of each text into its embedding: [B, d], float32 (float64 if given).

    hidden [R, h]: residual stream before the final norm. offsets [B + 1]: int, rows
    offsets[i]:offsets[i+1] belong to text i. norm_weight [h], eps: the final RMSNorm, frozen.
    row_weights [R]: weights that sum to 1 within a text; None takes the plain mean.
    projection [d, h], bias [d]: the collapsed W_A·W_R of LLM2Vec-Gen; None leaves the mean.
    normalize: divide by the L2 norm. A text without rows gives NaN: callers refuse it before.
    Raises OpError for shapes that do not fit.

    torch.ops.gen_fast.pool is the norm and the mean, which are bound by memory; the projection of
    a batch of means is one product, which the vendor's library does best.

    Source: LLM2Vec-Gen, arXiv 2603.10913, §3; both maps are linear, so one product suffices.
    """
    result: Tensor = OP(hidden, offsets, norm_weight, eps, row_weights, impl=impl)
    if projection is not None:
        dtype = result.dtype
        result = linear(result, projection.to(dtype), None if bias is None else bias.to(dtype))
    return l2_normalize(result, dim=-1) if normalize else result
