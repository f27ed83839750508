"""Attention in plain torch, one text at a time, any float dtype."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from gen_fast.ops.dropout.philox import HEADS, kept

from .options import AttentionOptions


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


def attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ/√D)·v for each text, and the log-sum-exp of the scores. See `op.attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    # Rows beyond the last text's are padding.
    end = int(options.cu_seqlens_q[-1])
    outputs, masses = [], []
    for text, (_, _, scores, values) in enumerate(_each_text(q, k, v, options)):
        weights = _dropped(scores.softmax(-1), text, options)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
        masses.append(scores.to(wide).logsumexp(-1).T)
    outputs.append(torch.zeros_like(q[end:]))
    masses.append(torch.zeros_like(q[end:, :, 0], dtype=wide))
    return torch.cat(outputs), torch.cat(masses)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `out` and `lse` are the results of `attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for text, (rows, keys, scores, values) in enumerate(_each_text(q, k, v, options)):
        n_key = keys.stop - keys.start
        own = scores.shape[-1] - n_key
        weights = (scores.to(wide) - lse[rows].to(wide).T.unsqueeze(-1)).exp()
        upstream = dout[rows].to(wide)
        delta = (upstream * out[rows].to(wide)).sum(-1).T.unsqueeze(-1)
        dweights = torch.einsum("qhd,khd->hqk", upstream, values.to(wide))
        # The derivative of dropout is dropout.
        dweights = _dropped(dweights, text, options)
        dscores = weights * (dweights - delta) * scale
        every_key = _with_prefix(k[keys], options.prefix_k, q.shape[1])
        dq[rows] = torch.einsum("hqk,khd->qhd", dscores, every_key.to(wide))
        # The heads of a group share a key: their gradients add up. The prefix has none.
        kept_weights = _dropped(weights, text, options)
        for target, part, factor in ((dk, dscores, q), (dv, kept_weights, dout)):
            each_head = torch.einsum("hqk,qhd->khd", part[..., own:], factor[rows].to(wide))
            target[keys] = each_head.unflatten(1, (k.shape[1], -1)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _each_text(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows of q, rows of k, masked scores [H, n, P + m] and values [P + m, H, D] of each text."""
    n_prefix = 0 if options.prefix_k is None else options.prefix_k.shape[0]
    bounds = zip(
        pairwise(options.cu_seqlens_q.tolist()),
        pairwise(options.cu_seqlens_k.tolist()),
        strict=True,
    )
    for i, ((q0, q1), (k0, k1)) in enumerate(bounds):
        keys = _with_prefix(k[k0:k1], options.prefix_k, q.shape[1])
        values = _with_prefix(v[k0:k1], options.prefix_v, q.shape[1])
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * q.shape[-1] ** -0.5
        block = (0, 0) if options.blocks is None else tuple(options.blocks[i].tolist())
        seen = visible(q1 - q0, k1 - k0, n_prefix, options.window, q.device, options.mask, block)
        yield slice(q0, q1), slice(k0, k1), scores.masked_fill(~seen, float("-inf")), values


def _dropped(weights: Tensor, text: int, options: AttentionOptions) -> Tensor:
    """`weights` [H, n, m] of one text with some of them 0 and the others scaled."""
    text_words = options.text_words
    if text_words is None:
        return weights
    heads, n_query, n_key = weights.shape
    device = weights.device
    position = torch.arange(n_key - n_query, n_key, device=device)
    c2 = options.layer * HEADS + torch.arange(heads, device=device).unsqueeze(1)
    keep = kept(options.seed, options.dropout, n_key, position, c2, text_words[text].long())
    return torch.where(keep, weights * options.kept_scale, 0)


def _with_prefix(own: Tensor, prefix: Tensor | None, heads: int) -> Tensor:
    """[P + n, H, D]: the prefix's rows before a text's own, each once for every head of a group."""
    rows = own if prefix is None else torch.cat((prefix, own))
    return rows.repeat_interleave(heads // own.shape[1], dim=1)
