"""Attention in plain torch, one text at a time, any float dtype."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def visible(
    n_query: int,
    n_key: int,
    n_prefix: int,
    window: int | None,
    device: torch.device,
    mask: str = "causal",
    block: tuple[int, int] = (0, 0),
) -> Tensor:
    """Mask [n_query, n_prefix + n_key]: True where a query may attend. See `op.attention`.

    Queries are the last `n_query` of the text's `n_key` tokens, which follow the prefix. `block`
    is the GEM mask's special block, in the text's own positions.
    """
    query = n_key - n_query + torch.arange(n_query, device=device).unsqueeze(1)
    key = torch.arange(-n_prefix, n_key, device=device).unsqueeze(0)
    if mask == "bidirectional":
        return torch.ones(n_query, n_prefix + n_key, dtype=torch.bool, device=device)
    seen = key <= query
    if window is not None:
        seen = seen & (query - key < window)
    if mask == "gem":
        first, after = block
        in_block = (query >= first) & (query < after) & (key >= first) & (key != query)
        seen = seen & ~((query >= after) & (key < first)) & ~in_block
    return seen


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
) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ/√D)·v for each text, and the log-sum-exp of the scores. See `op.attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    # Rows beyond the offsets are padding.
    end = int(q_offsets[-1])
    outputs, masses = [], []
    for _, _, scores, values in _each_text(
        q, k, v, q_offsets, k_offsets, prefix_k, prefix_v, window, mask, blocks
    ):
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        masses.append(scores.to(wide).logsumexp(-1).T)
    outputs.append(torch.zeros_like(q[end:]))
    masses.append(torch.zeros_like(q[end:, :, 0], dtype=wide))
    return torch.cat(outputs), torch.cat(masses)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `rest` are the arguments of `attention` after v."""
    wide = torch.promote_types(q.dtype, torch.float32)
    to_q, to_k, to_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for rows, keys, scores, values in _each_text(q, k, v, *rest):
        n_key = keys.stop - keys.start
        own = scores.shape[-1] - n_key
        weights = (scores.to(wide) - lse[rows].to(wide).T.unsqueeze(-1)).exp()
        upstream = grad[rows].to(wide)
        delta = (upstream * out[rows].to(wide)).sum(-1).T.unsqueeze(-1)
        to_weights = torch.einsum("qhd,khd->hqk", upstream, values.to(wide))
        to_scores = weights * (to_weights - delta) * scale
        every_key = _with_prefix(k[keys], rest[2], q.shape[1])
        to_q[rows] = torch.einsum("hqk,khd->qhd", to_scores, every_key.to(wide))
        # The heads of a group share a key: their gradients add up. The prefix has none.
        for target, part, factor in ((to_k, to_scores, q), (to_v, weights, grad)):
            made = torch.einsum("hqk,qhd->khd", part[..., own:], factor[rows].to(wide))
            target[keys] = made.unflatten(1, (k.shape[1], -1)).sum(2)
    return to_q.to(q.dtype), to_k.to(k.dtype), to_v.to(v.dtype)


def _each_text(
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
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows of q, rows of k, masked scores [H, n, P + m] and values [P + m, H, D] of each text."""
    n_prefix = 0 if prefix_k is None else prefix_k.shape[0]
    bounds = zip(pairwise(q_offsets.tolist()), pairwise(k_offsets.tolist()), strict=True)
    for i, ((q0, q1), (k0, k1)) in enumerate(bounds):
        keys = _with_prefix(k[k0:k1], prefix_k, q.shape[1])
        values = _with_prefix(v[k0:k1], prefix_v, q.shape[1])
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * q.shape[-1] ** -0.5
        block = (0, 0) if blocks is None else tuple(blocks[i].tolist())
        seen = visible(q1 - q0, k1 - k0, n_prefix, window, q.device, mask, block)
        yield slice(q0, q1), slice(k0, k1), scores.masked_fill(~seen, float("-inf")), values


def _with_prefix(own: Tensor, prefix: Tensor | None, heads: int) -> Tensor:
    """[P + n, H, D]: the prefix's rows before a text's own, each once for every head of a group."""
    rows = own if prefix is None else torch.cat((prefix, own))
    return rows.repeat_interleave(heads // own.shape[1], dim=1)
