"""Schema, gradient and choice of implementation for dropout of rows."""

from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Op, gpu, native
from gen_fast.ops.layout import adjacent

from . import reference
from .philox import ROWS, check_dropout, threshold, words_of


def check_rows(
    x: Tensor, text_keys: Tensor, positions: Tensor, p: float, seed: int, stream: int
) -> None:
    """Raise OpError for what cannot be dropped of rows."""
    if x.dim() != 2 or text_keys.shape != x.shape[:1] or positions.shape != x.shape[:1]:
        raise OpError(
            f"dropout takes rows [T, N] with text_keys and positions [T], not {list(x.shape)},"
            f" {list(text_keys.shape)} and {list(positions.shape)}"
        )
    check_dropout(p, seed, text_keys)
    if positions.dtype != torch.int64:
        raise OpError(f"positions must be int64, not {positions.dtype}")
    if not 0 <= stream < ROWS:
        raise OpError(f"a stream of dropout is in [0, 2^31), not {stream}")


OP = Op(
    "dropout",
    "(Tensor x, Tensor text_keys, Tensor positions, float p, int seed, int stream) -> Tensor",
    lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
    check=check_rows,
)
OP.backward = OP  # the same elements of the gradient, scaled alike
OP.register(REFERENCE)(reference.dropout)


OP.register(TRITON, gpu.supports)(gpu.deferred("dropout.triton_kernel", "dropout"))


@OP.register(CPP, native.cpp)
def _cpu(
    x: Tensor, text_keys: Tensor, positions: Tensor, p: float, seed: int, stream: int
) -> Tensor:
    x, text_keys, positions = adjacent(x), words_of(text_keys), positions.contiguous()
    out = native.empty_like(x)
    native.module().dropout(
        x.dtype,
        x,
        text_keys,
        positions,
        out,
        x.stride(0),
        *x.shape,
        threshold(p),
        1 / (1 - p),
        seed,
        ROWS + stream,
    )
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, text_keys, positions, *ctx.settings = inputs
    ctx.save_for_backward(text_keys, positions)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = OP.in_backward(ctx, grad, *ctx.saved_tensors, *ctx.settings)
    return dx, None, None, None, None, None


OP.differentiate(_save, _gradient)


def dropout(
    x: Tensor,
    text_keys: Tensor,
    positions: Tensor,
    p: float,
    seed: int,
    stream: int,
    *,
    impl: str | None = None,
) -> Tensor:
    """x / (1 - p), with a share p of the elements 0. Returns [T, N] in the same dtype; x if p is 0.

    x [T, N]; text_keys [T] int32 or int64, of which the low 32 bits count: a number of each row's
    text; positions [T] int64: where the row stands in its text. seed in [0, 2^63); stream in
    [0, 2^31): a number of what is dropped, a layer and a projection for instance. An element is
    dropped for what these say and for its column alone: not for its batch, nor for T or N.
    The gradient drops the same elements, chosen anew rather than kept.
    Raises OpError for shapes, dtypes and numbers that do not fit.

    Source: Srivastava et al., JMLR 15 (2014); Salmon et al., SC'11 (Philox4x32-10).
    """
    if p == 0:
        return x
    result: Tensor = OP(x, text_keys, positions, p, seed, stream, impl=impl)
    return result
