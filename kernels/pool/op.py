"""Schema and choice of implementation for pool."""

from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import ImplementationError, OpError
from gen_fast.ops import CPP, CUDA, REFERENCE, TRITON, Op, gpu, native

from . import reference


def _check(
    hidden: Tensor, cu_seqlens: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> None:
    if hidden.dim() != 2 or cu_seqlens.dim() != 1 or hidden.shape[1:] != norm_weight.shape:
        raise OpError(
            f"hidden {list(hidden.shape)}, cu_seqlens {list(cu_seqlens.shape)} and norm weight"
            f" {list(norm_weight.shape)} do not fit together"
        )
    if row_weights is not None and row_weights.shape != hidden.shape[:1]:
        raise OpError(f"{hidden.shape[0]} rows need as many weights, not {list(row_weights.shape)}")


OP = Op(
    "pool",
    "(Tensor hidden, Tensor cu_seqlens, Tensor norm_weight, float eps, Tensor? row_weights)"
    " -> Tensor",
    lambda hidden, cu_seqlens, norm_weight, eps, row_weights: hidden.new_empty(
        cu_seqlens.shape[0] - 1,
        hidden.shape[1],
        dtype=torch.promote_types(hidden.dtype, torch.float32),
    ),
    check=_check,
)
OP.register(REFERENCE)(reference.pool)


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    raise ImplementationError("op 'pool' has no gradient")


# Calling the op says so at once; through torch.ops and torch.compile it must not be silent either.
OP.differentiate(lambda ctx, inputs, output: None, _no_gradient)


# Registered before Triton's, so chosen only when asked for: which of the two is ahead has not been
# measured yet.
@OP.register(CUDA, native.cuda)
def _cuda(
    hidden: Tensor, cu_seqlens: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> Tensor:
    hidden, norm_weight = native.aligned(hidden), native.aligned(norm_weight.to(hidden.dtype))
    cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    weights = None if row_weights is None else row_weights.float().contiguous()
    out = hidden.new_empty(len(cu_seqlens) - 1, hidden.shape[1], dtype=torch.float32)
    if out.numel():
        stream = native.stream(hidden)
        native.cuda_module().pool(
            hidden.dtype, hidden, cu_seqlens, norm_weight, weights, out, *out.shape, eps, stream
        )
    return out


OP.register(TRITON, gpu.supports)(gpu.deferred("pool.triton_kernel", "pool"))


@OP.register(CPP, native.cpp)
def _cpp(
    hidden: Tensor, cu_seqlens: Tensor, norm_weight: Tensor, eps: float, row_weights: Tensor | None
) -> Tensor:
    hidden, cu_seqlens = hidden.contiguous(), cu_seqlens.int().contiguous()
    if norm_weight.dtype != hidden.dtype:
        norm_weight = norm_weight.to(hidden.dtype)
    norm_weight = norm_weight.contiguous()
    weights = None if row_weights is None else row_weights.float().contiguous()
    texts, size = cu_seqlens.size(0) - 1, hidden.size(1)
    out = hidden.new_empty(texts, size, dtype=torch.float32)
    native.module().pool(
        hidden.dtype, hidden, cu_seqlens, norm_weight, weights, out, texts, size, eps
    )
    return out


def pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    norm_weight: Tensor,
    eps: float,
    row_weights: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """The mean over the needed rows of each text: [B, h], float32 (float64 if given).

    hidden [R, h]: residual stream before the final norm. cu_seqlens [B + 1]: int, rows
    cu_seqlens[i]:cu_seqlens[i + 1] belong to text i. norm_weight [h], eps: the final RMSNorm.
    row_weights [R]: weights that sum to 1 within a text; None takes the plain mean.
    A text without rows gives NaN: callers refuse it before. No gradient: training pools in torch.
    Raises OpError for shapes that do not fit.

    Source: LLM2Vec-Gen, arXiv 2603.10913, §3; its maps are linear, so they follow the mean.
    """
    result: Tensor = OP(hidden, cu_seqlens, norm_weight, eps, row_weights, impl=impl)
    return result
