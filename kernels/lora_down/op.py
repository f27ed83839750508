"""Schemas, gradient and choice of implementation for LoRA's down projection."""

from functools import partial
from typing import Any

from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Op, gpu, native
from gen_fast.ops.dropout import check_rows, dropout

from . import reference
from .reference import Dropped, wide

# Parts that share an input: queries, keys and values are three.
PARTS = 4
_DROPPED = "Tensor text_keys, Tensor positions, float p, int seed, int[] streams"


def _check(x: Tensor, a: Tensor, dropped: Dropped) -> None:
    streams = dropped.streams
    if not 1 <= len(streams) <= PARTS:
        raise OpError(f"1 to {PARTS} parts share an input, not {len(streams)}")
    for stream in streams:
        check_rows(x, *dropped.where, stream)
    if a.dim() != 2 or a.shape[1] != x.shape[1] or a.shape[0] % len(streams):
        raise OpError(
            f"a must be [{len(streams)} parts of one rank, {x.shape[1]}], not {list(a.shape)}"
        )


def _check_backward(grad: Tensor, x: Tensor, a: Tensor, dropped: Dropped) -> None:
    _check(x, a, dropped)
    if grad.shape != (len(x), len(a)):
        raise OpError(f"the gradient must be {[len(x), len(a)]}, not {list(grad.shape)}")


def _fake_backward(grad: Tensor, x: Tensor, a: Tensor, dropped: Dropped) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), a.new_empty(a.shape, dtype=wide(a.dtype))


BACKWARD = Op(
    "lora_down_backward",
    f"(Tensor grad, Tensor x, Tensor a, {_DROPPED}) -> (Tensor, Tensor)",
    _fake_backward,
    check=_check_backward,
    options=Dropped,
)
OP = Op(
    "lora_down",
    f"(Tensor x, Tensor a, {_DROPPED}) -> Tensor",
    lambda x, a, dropped: x.new_empty(len(x), len(a)),
    BACKWARD,
    _check,
    options=Dropped,
)
OP.register(REFERENCE)(reference.lora_down)
BACKWARD.register(REFERENCE)(reference.lora_down_backward)


# On a CPU the products are long enough to be made one after another.
_cpp_dropout = partial(dropout, impl=CPP)
OP.register(CPP, native.cpp)(partial(reference.lora_down, dropout=_cpp_dropout))
BACKWARD.register(CPP, native.cpp)(partial(reference.lora_down_backward, dropout=_cpp_dropout))


OP.register(TRITON, gpu.supports)(gpu.deferred("lora_down.triton_kernel", "lora_down"))
BACKWARD.register(TRITON, gpu.supports)(
    gpu.deferred("lora_down.triton_kernel", "lora_down_backward")
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, a, dropped = inputs
    ctx.save_for_backward(x, a, dropped.text_keys, dropped.positions)
    ctx.settings = dropped.p, dropped.seed, dropped.streams


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, a, *rows = ctx.saved_tensors
    dx, da = BACKWARD.in_backward(ctx, grad, x, a, Dropped(*rows, *ctx.settings))
    return dx, da.to(a.dtype), None


OP.differentiate(_save, _gradient)


def lora_down(x: Tensor, a: Tensor, dropped: Dropped, *, impl: str | None = None) -> Tensor:
    """x [T, in] on the way to the ranks of the linears that read it: [T, parts · r].

    a [parts · r, in]: their A, one below the other. Each part has an input of its own: `dropout` of
    x with its stream, and text_keys, positions, p and seed that are the same for all.
    Raises OpError for other shapes and more than PARTS parts.

    Source: Hu et al., arXiv 2106.09685, §4.1, with dropout as in PEFT.
    """
    result: Tensor = OP(x, a, dropped, impl=impl)
    return result


def lora_down_backward(
    grad: Tensor, x: Tensor, a: Tensor, dropped: Dropped, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x [T, in] and of a [parts · r, in], for `grad` [T, parts · r] of `lora_down`.

    That of a is at least float32: it is a sum over all tokens.
    """
    result: tuple[Tensor, Tensor] = BACKWARD(grad, x, a, dropped, impl=impl)
    return result
