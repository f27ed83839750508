"""Choice of implementation for attention."""

from torch import Tensor

from gen_fast.ops import Op

from . import reference, sdpa

OP = Op("attention")
OP.register("reference")(reference.attention)
OP.register("sdpa", devices=("cpu",))(sdpa.attention)


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
    result: Tensor = OP.choose(q.device.type, impl)(
        q, k, v, q_offsets, k_offsets, prefix_k, prefix_v, window
    )
    return result
