"""Choice of implementation for attention."""

import torch
from torch import Tensor

from gen_fast.ops import Op, native

from . import reference, sdpa

OP = Op("attention")
OP.register("reference")(reference.attention)
OP.register("sdpa", devices=("cpu",))(sdpa.attention)


@OP.register("cpu", **native.ON_CPU)
def _cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    window: int | None,
) -> Tensor:
    heads, size = q.shape[1:]
    q, k, v = _rows(q), _rows(k), _rows(v)
    prefix_k = None if prefix_k is None else _rows(prefix_k)
    prefix_v = None if prefix_v is None else _rows(prefix_v)
    out = torch.empty(q.shape, dtype=q.dtype)
    native.module().attention(
        q.dtype == torch.bfloat16,
        *map(native.address, (q, k, v, prefix_k, prefix_v, out, q_offsets, k_offsets)),
        *(len(q_offsets) - 1, heads, k.shape[1], size),
        0 if prefix_k is None else prefix_k.shape[0],
        *(0 if x is None else x.stride(0) for x in (q, k, v, prefix_k, prefix_v)),
        window or 0,
    )
    return out


def _rows(x: Tensor) -> Tensor:
    """`x` [T, N, D] with its heads side by side in memory, as the C++ op reads them."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    window: int | None = None,
    *,
    impl: str | None = None,
) -> Tensor:
    """Causal attention of packed texts, each behind one shared prefix. Returns [Tq, H, D].

    q [Tq, H, D]: queries of each text's *last* rows; k, v [Tk, KV, D]: all its own tokens, with H
    a multiple of KV (grouped-query attention). q_offsets, k_offsets [B + 1]: int32, rows
    offsets[i]:offsets[i+1] belong to text i; a text may have fewer queries than keys.
    prefix_k, prefix_v [P, KV, D]: keys and values that stand before every text, all visible.
    window: sliding window in tokens, counting the query itself; None for full attention.

    Source: Ainslie et al., arXiv 2305.13245 (grouped queries); Dao, arXiv 2307.08691 (varlen).
    """
    result: Tensor = OP.choose(impl, q, k, v)(
        q, k, v, q_offsets, k_offsets, prefix_k, prefix_v, window
    )
    return result
