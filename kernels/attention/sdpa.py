"""Attention through torch's own CPU flash kernel: one call a run of equal-length texts.

The shared prefix is attended once for all rows of the batch, as one long query, and merged with
each text's own attention by their log-sum-exp (cascade attention: Ye et al., flashinfer, 2024).
So the prefix's keys are read once a batch rather than once a text.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from .reference import attention as reference_attention
from .reference import attention_backward as reference_backward
from .reference import visible

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# (query, key, value, dropout_p, is_causal, attn_mask=, scale=) -> (output, logsumexp)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _heads_first(x: Tensor, texts: int) -> Tensor:
    """[texts · n, H, D] -> [texts, H, n, D], a view."""
    return x.view(texts, -1, *x.shape[1:]).transpose(1, 2)


def _runs(
    q_offsets: Tensor, k_offsets: Tensor
) -> Iterator[tuple[slice, slice, int, Tensor | None]]:
    """Runs of texts with equal shapes: their rows of q, rows of k, number, and bias if needed."""
    q_bounds, k_bounds = q_offsets.tolist(), k_offsets.tolist()
    counts = ((b - a for a, b in pairwise(bounds)) for bounds in (q_bounds, k_bounds))
    first = 0
    for (n_query, n_key), run in groupby(zip(*counts, strict=True)):
        texts = len(list(run))
        rows = slice(q_bounds[first], q_bounds[first + texts])
        keys = slice(k_bounds[first], k_bounds[first + texts])
        first += texts
        if n_query == n_key:
            bias = None
        else:
            seen = visible(n_query, n_key, 0, None, q_offsets.device)
            bias = torch.where(seen, 0.0, -torch.inf)
        if n_query:
            yield rows, keys, texts, bias


def _narrow(k_offsets: Tensor, prefix_k: Tensor | None, window: int | None) -> bool:
    """Whether a window hides anything: rare (Mistral beyond 4,096 tokens), so masks suffice."""
    longest = int(k_offsets.diff().max()) if len(k_offsets) > 1 else 0
    return window is not None and longest + (0 if prefix_k is None else len(prefix_k)) > window


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
    """See `op.attention`; the causal mask only."""
    if _narrow(k_offsets, prefix_k, window):
        return reference_attention(q, k, v, q_offsets, k_offsets, prefix_k, prefix_v, window)
    # Rows beyond the offsets are padding: 0.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys, texts, bias in _runs(q_offsets, k_offsets):
        own, own_lse = _flash(
            *(_heads_first(x, texts) for x in (q[rows], k[keys], v[keys])),
            *(0.0, bias is None),
            attn_mask=None if bias is None else bias.to(q.dtype),
        )
        _heads_first(out[rows], texts).copy_(own)
        _heads_first(lse[rows].unsqueeze(-1), texts).copy_(own_lse.unsqueeze(-1))
    end = int(q_offsets[-1])
    if prefix_k is None or prefix_v is None or not end:
        return out, lse
    shared, shared_lse = _flash(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q[:end], prefix_k, prefix_v)), 0.0, False
    )
    # out = (out·e^lse + shared·e^shared_lse) / (e^lse + e^shared_lse), without overflow
    own_out, own_lse, shared_lse = out[:end], lse[:end], shared_lse[0].transpose(0, 1)
    share = torch.sigmoid(shared_lse - own_lse).unsqueeze(-1).to(out.dtype)
    torch.lerp(own_out, shared[0].transpose(0, 1), share, out=own_out)
    torch.logaddexp(own_lse, shared_lse, out=own_lse)
    return out, lse


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    prefix_k: Tensor | None,
    prefix_v: Tensor | None,
    window: int | None,
    mask: str,
    blocks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the causal mask only.

    With the log-sum-exp over prefix and own keys, each part's backward pass gives its own share of
    the gradient of q, so nothing has to be merged but a sum.
    """
    if _narrow(k_offsets, prefix_k, window):
        rest = (q_offsets, k_offsets, prefix_k, prefix_v, window, mask, blocks)
        return reference_backward(grad, q, k, v, out, lse, *rest)
    # A text may have fewer queries than keys: what no query sees has no gradient.
    to_q, to_k, to_v = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    for rows, keys, texts, bias in _runs(q_offsets, k_offsets):
        parts = [_heads_first(x, texts) for x in (grad[rows], q[rows], k[keys], v[keys], out[rows])]
        own = _flash_backward(
            *parts,
            _heads_first(lse[rows].unsqueeze(-1), texts).squeeze(-1).contiguous(),
            *(0.0, bias is None),
            attn_mask=None if bias is None else bias.to(q.dtype),
        )
        for target, part, where in (
            (to_q, own[0], rows),
            (to_k, own[1], keys),
            (to_v, own[2], keys),
        ):
            _heads_first(target[where], texts).copy_(part)
    end = int(q_offsets[-1])
    if prefix_k is not None and prefix_v is not None and end:
        parts = [
            x.transpose(0, 1).unsqueeze(0)
            for x in (grad[:end], q[:end], prefix_k, prefix_v, out[:end])
        ]
        shared = _flash_backward(*parts, lse[:end].T.unsqueeze(0).contiguous(), 0.0, False)
        to_q[:end] += shared[0][0].transpose(0, 1)
    return to_q, to_k, to_v
