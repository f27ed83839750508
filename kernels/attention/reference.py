"""Attention in plain torch, one text at a time, any float dtype."""

import torch
from torch import Tensor


def visible(
    n_query: int, n_key: int, n_prefix: int, window: int | None, device: torch.device
) -> Tensor:
    """Causal mask [n_query, n_prefix + n_key]: True where a query may attend.

    Queries are the last `n_query` of the text's `n_key` tokens, which follow the prefix.
    """
    query = n_prefix + n_key - n_query + torch.arange(n_query, device=device).unsqueeze(1)
    key = torch.arange(n_prefix + n_key, device=device).unsqueeze(0)
    mask = key <= query
    return mask if window is None else mask & (query - key < window)


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
    """softmax(q·kᵀ/√D)·v for each text. See `op.attention`."""
    n_prefix = 0 if prefix_k is None else prefix_k.shape[0]
    group = q.shape[1] // k.shape[1]
    outputs = []
    q_bounds, k_bounds = q_offsets.tolist(), k_offsets.tolist()
    for q0, q1, k0, k1 in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:], strict=False):
        keys, values = k[k0:k1], v[k0:k1]
        if prefix_k is not None and prefix_v is not None:
            keys, values = torch.cat((prefix_k, keys)), torch.cat((prefix_v, values))
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * q.shape[-1] ** -0.5
        mask = visible(q1 - q0, k1 - k0, n_prefix, window, q.device)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs) if outputs else torch.empty_like(q)
