"""Schemas, gradient and choice of implementation for attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import (
    CPP,
    REFERENCE,
    SDPA,
    TRITON,
    Case,
    Op,
    gpu,
    native,
    other_option,
    unsupported,
)
from gen_fast.ops.layout import dense_rows_and_stride

from . import reference, sdpa
from .options import AttentionOptions

# The fields of AttentionOptions.
_OPTIONS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? prefix_k, Tensor? prefix_v, int? window,"
    " str mask, Tensor? blocks, float dropout, int seed, int layer, Tensor? text_keys"
)


def _check(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> None:
    (_, heads, size), k_shape = q.shape, k.shape
    _, kv_heads, k_size = k_shape
    if k_shape != v.shape or k_size != size or kv_heads == 0 or heads % kv_heads:
        raise OpError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise OpError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    prefix = options.prefix_k
    if prefix is not None and (prefix.shape[1:] != k_shape[1:] or prefix.dtype != k.dtype):
        raise OpError(
            f"a prefix {list(prefix.shape)} in {prefix.dtype} does not go before keys"
            f" {list(k.shape)} in {k.dtype}"
        )


def _option(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> str:
    return options.mask + " with dropout" if options.dropout else options.mask


BACKWARD = Op(
    "attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    lambda dout, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    option=lambda dout, q, k, v, *rest: _option(q, k, v, rest[-1]),
    options=AttentionOptions,
)
OP = Op(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    lambda q, *rest: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)),
    ),
    BACKWARD,
    _check,
    option=_option,
    options=AttentionOptions,
)
OP.register(REFERENCE)(reference.attention)
BACKWARD.register(REFERENCE)(reference.attention_backward)


def _sdpa_supports(case: Case) -> str | None:
    return unsupported(case, "cpu", sdpa.DTYPES) or other_option(case, "causal")


OP.register(SDPA, _sdpa_supports)(sdpa.attention)
BACKWARD.register(SDPA, _sdpa_supports)(sdpa.attention_backward)


OP.register(TRITON, gpu.supports)(gpu.deferred("attention.triton_kernel", "attention"))
BACKWARD.register(TRITON, gpu.supports)(
    gpu.deferred("attention.triton_backward", "attention_backward")
)


def _run_cpp(
    function: Callable[..., None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    out: Tensor,
    lse: Tensor | None,
    *gradients: Tensor,
) -> None:
    """Call a function of gen_fast._C. gradients: dout, dq, dk and dv, for theirs."""
    rows, heads, size = q.shape
    q, q_stride = dense_rows_and_stride(q, size)
    k, k_stride = dense_rows_and_stride(k, size)
    v, v_stride = dense_rows_and_stride(v, size)
    strides, shape = (q_stride, k_stride, v_stride), (rows, heads, k.size(1), size)
    function(options.cpp[0], q.dtype, q, k, v, out, lse, *gradients, *strides, *shape)


def _cpp_inference(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> tuple[Tensor, None]:
    out = native.empty_like(q)
    _run_cpp(native.module().attention, q, k, v, options, out, None)
    return out, None


@OP.register(CPP, native.cpp, _cpp_inference)
def _cpp(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    out = native.empty_like(q)
    lse = q.new_empty(q.size(0), q.size(1), dtype=torch.float32)
    _run_cpp(native.module().attention, q, k, v, options, out, lse)
    return out, lse


@BACKWARD.register(CPP, native.cpp)
def _cpp_backward(dout: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse, options = inputs
    # Keys without queries, and padding rows, have no gradient.
    dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    function = native.module().attention_backward
    _run_cpp(function, q, k, v, options, out, lse, dout, dq, dk, dv)
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, options = inputs
    ctx.batch = options.batch
    ctx.window, ctx.mask = options.window, options.mask
    # What is dropped is chosen anew from these.
    ctx.dropout, ctx.seed, ctx.layer = options.dropout, options.seed, options.layer
    ctx.save_for_backward(
        q,
        k,
        v,
        *output,
        options.cu_seqlens_q,
        options.cu_seqlens_k,
        options.prefix_k,
        options.prefix_v,
        options.blocks,
        options.text_keys,
    )
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens_q, cu_seqlens_k, prefix_k, prefix_v, blocks, text_keys = ctx.saved_tensors
    options = AttentionOptions(
        cu_seqlens_q,
        cu_seqlens_k,
        prefix_k,
        prefix_v,
        ctx.window,
        ctx.mask,
        blocks,
        ctx.dropout,
        ctx.seed,
        ctx.layer,
        text_keys,
    ).with_batch(ctx.batch)
    dq, dk, dv = BACKWARD.in_backward(ctx, dout.contiguous(), *tensors, options)
    return dq, dk, dv, None


OP.differentiate(_save, _gradient)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: AttentionOptions,
    *,
    impl: str | None = None,
) -> Tensor:
    """Attention of packed texts, each behind one shared prefix. Returns [Tq, H, D].

    q [Tq, H, D]: queries of each text's *last* rows; k, v [Tk, KV, D]: all its own tokens, with H
    a multiple of KV (grouped-query attention). Rows beyond the last of options.cu_seqlens_q and
    options.cu_seqlens_k are padding: their results and gradients are 0.
    Gradients reach q, k and v. Raises OpError for shapes and dtypes that do not fit.

    Source: Ainslie et al., arXiv 2305.13245 (grouped queries); Dao, arXiv 2307.08691 (varlen);
    BehnamGhader et al., arXiv 2404.05961, §2.1 (bidirectional); GEM, arXiv 2506.04344 (mask);
    Salmon et al., SC'11 (Philox4x32-10, for dropout).
    """
    result: Tensor = OP(q, k, v, options, impl=impl)[0]
    return result
