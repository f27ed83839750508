"""Attention through torch's own CPU flash kernel: one call a run of equal-length texts.

The shared prefix is attended once for all rows of the batch, as one long query, and merged with
each text's own attention by their log-sum-exp (cascade attention: Ye et al., flashinfer, 2024).
So the prefix's keys are read once a batch rather than once a text.
"""

from itertools import groupby, pairwise

import torch
from torch import Tensor

from .reference import attention as reference_attention
from .reference import visible

# (query, key, value, dropout_p, is_causal, attn_mask=, scale=) -> (output, logsumexp)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _heads_first(x: Tensor, texts: int) -> Tensor:
    """[texts · n, H, D] -> [texts, H, n, D], a view."""
    return x.view(texts, -1, *x.shape[1:]).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """See `op.attention`."""
    q_bounds, k_bounds = q_offsets.tolist(), k_offsets.tolist()
    n_prefix = 0 if prefix_k is None else prefix_k.shape[0]
    longest = max((b - a for a, b in pairwise(k_bounds)), default=0)
    if window is not None and n_prefix + longest > window:
        # A window narrower than the text is rare (Mistral beyond 4,096 tokens): masks suffice.
        return reference_attention(q, k, v, q_offsets, k_offsets, prefix_k, prefix_v, window)

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    shapes = [
        (q_bounds[i + 1] - q_bounds[i], k_bounds[i + 1] - k_bounds[i])
        for i in range(len(q_bounds) - 1)
    ]
    first = 0
    for (n_query, n_key), run in groupby(shapes):
        texts = len(list(run))
        rows = slice(q_bounds[first], q_bounds[first + texts])
        keys = slice(k_bounds[first], k_bounds[first + texts])
        first += texts
        if n_query == 0:
            continue
        mask = None if n_query == n_key else visible(n_query, n_key, 0, None, q.device)
        own, own_lse = _flash(
            _heads_first(q[rows], texts),
            _heads_first(k[keys], texts),
            _heads_first(v[keys], texts),
            0.0,
            mask is None,
            attn_mask=None if mask is None else torch.where(mask, 0.0, -torch.inf).to(q.dtype),
        )
        _heads_first(out[rows], texts).copy_(own)
        _heads_first(lse[rows].unsqueeze(-1), texts).copy_(own_lse.unsqueeze(-1))
    if prefix_k is None or prefix_v is None:
        return out

    shared, shared_lse = _flash(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, prefix_k, prefix_v)), 0.0, False
    )
    # out = (out·e^lse + shared·e^shared_lse) / (e^lse + e^shared_lse), without overflow
    share = torch.sigmoid(shared_lse[0].transpose(0, 1) - lse).unsqueeze(-1).to(out.dtype)
    return torch.lerp(out, shared[0].transpose(0, 1), share)
