"""Schemas, gradient and choice of implementation for attention."""

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
from gen_fast.ops.layout import dense_rows

from . import reference, sdpa

MASKS = ("causal", "bidirectional", "gem")
_MASK_NUMBERS = {mask: number for number, mask in enumerate(MASKS)}  # csrc/cpu/ops.h

_INPUTS = (
    "Tensor q_offsets, Tensor k_offsets, Tensor? prefix_k, Tensor? prefix_v, int? window,"
    " str mask, Tensor? blocks"
)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    window: int | None,
    mask: str,
    blocks: Tensor | None,
) -> None:
    (_, heads, size), (_, kv_heads, k_size) = q.shape, k.shape
    if k.shape != v.shape or k_size != size or kv_heads == 0 or heads % kv_heads:
        raise OpError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise OpError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    _check_offsets(q_offsets, q_offsets.numel())
    if k_offsets is not q_offsets:
        _check_offsets(k_offsets, q_offsets.numel())
    if prefix_k is not None or prefix_v is not None:
        _check_prefix(prefix_k, prefix_v, k)
    if window is not None and window < 1:
        raise OpError(f"a sliding window is at least 1 token, not {window}")
    if mask != "causal":
        _check_mask(mask, len(q_offsets) - 1, window, blocks)


def _check_offsets(offsets: Tensor, count: int) -> None:
    if offsets.dtype != torch.int32 or not offsets.is_contiguous():
        raise OpError(f"offsets must be contiguous and int32, not {offsets.dtype}")
    if offsets.numel() != count or not count:
        raise OpError("offsets must be equally many, one more than there are texts")


def _check_prefix(prefix_k: Tensor | None, prefix_v: Tensor | None, k: Tensor) -> None:
    if prefix_k is None or prefix_v is None or prefix_k.shape != prefix_v.shape:
        raise OpError("a prefix has as many keys as values")
    for prefix in (prefix_k, prefix_v):
        if prefix.shape[1:] != k.shape[1:] or prefix.dtype != k.dtype:
            raise OpError(
                f"a prefix {list(prefix.shape)} in {prefix.dtype} does not go before keys"
                f" {list(k.shape)} in {k.dtype}"
            )


def _check_mask(mask: str, texts: int, window: int | None, blocks: Tensor | None) -> None:
    if mask not in MASKS:
        raise OpError(f"mask must be one of {', '.join(MASKS)}, not {mask!r}")
    if window is not None and mask == "bidirectional":
        raise OpError("a sliding window has no meaning in a bidirectional mask")
    if (blocks is None) == (mask == "gem"):
        raise OpError("`blocks` goes with the gem mask, and only with it")
    if blocks is not None and (blocks.shape != (texts, 2) or blocks.dtype != torch.int32):
        raise OpError(f"blocks must be {[texts, 2]} of int32, not {list(blocks.shape)}")


BACKWARD = Op(
    "attention_backward",
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    option=lambda *inputs: inputs[-2],
)
OP = Op(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, {_INPUTS}) -> (Tensor, Tensor)",
    lambda q, *rest: (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)),
    ),
    BACKWARD,
    _check,
    option=lambda *inputs: inputs[-2],
)
OP.register(REFERENCE)(reference.attention)
BACKWARD.register(REFERENCE)(reference.attention_backward)


def _sdpa_supports(case: Case) -> str | None:
    return unsupported(case, "cpu", sdpa.DTYPES) or other_option(case, "causal")


OP.register(SDPA, _sdpa_supports)(sdpa.attention)
BACKWARD.register(SDPA, _sdpa_supports)(sdpa.attention_backward)


@OP.register(TRITON, gpu.supports)
def _triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from . import triton_kernel

    return triton_kernel.attention(*inputs)


@BACKWARD.register(TRITON, gpu.supports)
def _triton_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_backward

    return triton_backward.attention_backward(*inputs)


@OP.register(CPP, native.cpp)
def _cpu(q: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    out = native.empty_like(q)
    lse = q.new_empty(q.size(0), q.size(1), dtype=torch.float32)
    _run_cpu(out, lse, 0, 0, 0, 0, q, *inputs)
    return out, lse


@BACKWARD.register(CPP, native.cpp)
def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    # Keys without queries, and padding rows, have no gradient.
    to_q, to_k, to_v = (x.new_zeros(x.shape) for x in (q, k, v))
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    gradients = (grad.data_ptr(), to_q.data_ptr(), to_k.data_ptr(), to_v.data_ptr())
    _run_cpu(out, lse, *gradients, q, k, v, *inputs)
    return to_q, to_k, to_v


def _run_cpu(
    out: Tensor,
    lse: Tensor,
    grad: int,
    to_q: int,
    to_k: int,
    to_v: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    window: int | None,
    mask: str,
    blocks: Tensor | None,
) -> None:
    """Fill `out` and `lse`; or, given the addresses of all gradients, those of q, k and v."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    pk = pv = pk_stride = pv_stride = prefix = 0
    if prefix_k is not None and prefix_v is not None:
        prefix_k, prefix_v = dense_rows(prefix_k), dense_rows(prefix_v)
        pk, pv = prefix_k.data_ptr(), prefix_v.data_ptr()
        pk_stride, pv_stride, prefix = prefix_k.stride(0), prefix_v.stride(0), prefix_k.size(0)
    blocks = None if blocks is None else blocks.contiguous()
    # Plain positional arguments: to gather so many in tuples takes as long as the smallest call.
    native.module().attention(
        q.dtype == torch.bfloat16,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        pk,
        pv,
        pk_stride,
        pv_stride,
        prefix,
        out.data_ptr(),
        lse.data_ptr(),
        q_offsets.data_ptr(),
        k_offsets.data_ptr(),
        q.size(0),
        q_offsets.size(0) - 1,
        q.size(1),
        k.size(1),
        q.size(2),
        window or 0,
        _MASK_NUMBERS[mask],
        0 if blocks is None else blocks.data_ptr(),
        grad,
        to_q,
        to_k,
        to_v,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_offsets, k_offsets, prefix_k, prefix_v, ctx.window, ctx.mask, blocks = inputs
    ctx.save_for_backward(q, k, v, *output, q_offsets, k_offsets, prefix_k, prefix_v, blocks)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, blocks = ctx.saved_tensors
    rest = (ctx.window, ctx.mask, blocks)
    grads = BACKWARD.torch_op(grad.contiguous(), *tensors, *rest, impl=ctx.impl)
    return *grads, *(None,) * 7


OP.differentiate(_save, _gradient)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    window: int | None = None,
    mask: str = "causal",
    blocks: Tensor | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Attention of packed texts, each behind one shared prefix. Returns [Tq, H, D].

    q [Tq, H, D]: queries of each text's *last* rows; k, v [Tk, KV, D]: all its own tokens, with H
    a multiple of KV (grouped-query attention). q_offsets, k_offsets [B + 1]: int32, rows
    offsets[i]:offsets[i+1] belong to text i; a text may have fewer queries than keys. Rows beyond
    the last offset are padding: their results and gradients are 0.
    prefix_k, prefix_v [P, KV, D]: keys and values that stand before every text; they are frozen
    and get no gradient.
    window: sliding window in tokens, counting the query itself; None for full attention.
    mask: "causal"; "bidirectional", every key of prefix and text (LLM2Vec); or "gem", causal
    except that blocks[i] = (first, after) of blocks [B, 2] int32 marks special tokens at own
    positions first … after - 1, which do not see each other, and that tokens after them see
    neither the prefix nor the text before them.
    Raises OpError for shapes and dtypes that do not fit, and for a mask that does not exist or
    cannot be combined. What offsets and blocks hold is not looked at: on a GPU that would stop the
    host.

    Source: Ainslie et al., arXiv 2305.13245 (grouped queries); Dao, arXiv 2307.08691 (varlen);
    BehnamGhader et al., arXiv 2404.05961, §2.1 (bidirectional); GEM, arXiv 2506.04344 (mask).
    """
    result: Tensor = OP(
        *(q, k, v, q_offsets, k_offsets, prefix_k, prefix_v, window, mask, blocks), impl=impl
    )[0]
    return result
