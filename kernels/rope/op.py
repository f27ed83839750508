"""Schemas, gradient and choice of implementation for rope."""

from typing import Any

from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Op, gpu, native
from gen_fast.ops.layout import dense_rows

from . import reference


def _check(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> None:
    rows, heads, size = x.shape
    if size % 2 or cos.shape != (rows, size // 2) or sin.shape != cos.shape:
        raise OpError(
            f"x {list(x.shape)} needs cosines and sines of half its even head size, not"
            f" {list(cos.shape)} and {list(sin.shape)}"
        )
    if norm is not None and (norm.shape != (heads, size) or norm.dtype != x.dtype):
        raise OpError(
            f"the norm must be {[heads, size]} in {x.dtype}, not {list(norm.shape)} in {norm.dtype}"
        )


BACKWARD = Op(
    "rope_backward",
    "(Tensor grad, Tensor? x, Tensor cos, Tensor sin, Tensor? norm, float eps) -> Tensor",
    lambda grad, x, cos, sin, norm, eps: grad.new_empty(grad.shape),
)
OP = Op(
    "rope",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? norm, float eps) -> Tensor",
    lambda x, cos, sin, norm, eps: x.new_empty(x.shape),
    BACKWARD,
    _check,
)
OP.register(REFERENCE)(reference.rope)
BACKWARD.register(REFERENCE)(reference.rope_backward)


OP.register(TRITON, gpu.supports)(gpu.deferred("rope.triton_kernel", "rope"))
BACKWARD.register(TRITON, gpu.supports)(gpu.deferred("rope.triton_kernel", "rope_backward"))


@OP.register(CPP, native.cpp)
def _cpu(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float, *, inplace: bool = False
) -> Tensor:
    x = dense_rows(x)
    out = x if inplace else native.empty_like(x)
    norm = None if norm is None else norm.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    native.module().rope(x.dtype, x, out, cos, sin, norm, x.stride(0), out.stride(0), *x.shape, eps)
    return out


@BACKWARD.register(CPP, native.cpp)
def _cpu_backward(
    grad: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float
) -> Tensor:
    grad = dense_rows(grad)
    x = None if x is None else dense_rows(x)
    out = native.empty_like(grad)
    norm = None if norm is None else norm.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    strides = grad.stride(0), 0 if x is None else x.stride(0)
    native.module().rope_backward(
        grad.dtype, grad, x, out, cos, sin, norm, *strides, *grad.shape, eps
    )
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, norm, ctx.eps = inputs
    # A rotation's gradient needs no input; only the norm's does.
    ctx.save_for_backward(x if norm is not None else None, cos, sin, norm)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return BACKWARD.in_backward(ctx, grad, *ctx.saved_tensors, ctx.eps), *(None,) * 4


OP.differentiate(_save, _gradient)


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    *,
    inplace: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Apply the optional per-head RMSNorm and the rotary embedding. Returns [T, N, D].

    x [T, N, D]: the query and key heads side by side, so that one pass serves both; any strides
    with a unit last one. cos, sin [T, D/2]: float32 (float64 if x is), of each row's position.
    norm [N, D]: a norm weight for each head (Qwen3: the query weight H times, then the key weight
    KV times), or None; it is frozen and gets no gradient.
    inplace: the result may be written into `x`.
    Raises OpError for shapes or dtypes that do not fit.

    Source: Su et al., arXiv 2104.09864; Qwen3 technical report, arXiv 2505.09388, §2.
    """
    result: Tensor = OP(x, cos, sin, norm, eps, impl=impl, inplace=inplace)
    return result
