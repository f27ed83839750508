"""Attention through torch's own CPU flash kernel: one call a run of equal-length texts.

The shared prefix is attended once for all rows of the batch, as one long query, and merged with
each text's own attention by their log-sum-exp (cascade attention: Ye et al., flashinfer, 2024).
So the prefix's keys are read once a batch rather than once a text.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
from torch import Tensor

from .options import AttentionOptions
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


def _as_one_text(x: Tensor) -> Tensor:
    """[n, H, D] -> [1, H, n, D], a view."""
    return x.transpose(0, 1).unsqueeze(0)


def _runs(options: AttentionOptions) -> Iterator[tuple[slice, slice, int, Tensor | None]]:
    """Runs of texts with equal shapes: their rows of q, rows of k, number, and bias if needed."""
    q_bounds, k_bounds = options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist()
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
            seen = visible(n_query, n_key, 0, None, options.cu_seqlens_q.device)
            bias = torch.where(seen, 0.0, -torch.inf)
        if n_query:
            yield rows, keys, texts, bias


def _narrow(options: AttentionOptions) -> bool:
    """Whether a window hides anything: rare (Mistral beyond 4,096 tokens), so masks suffice."""
    if options.window is None:
        return False
    longest = int(options.cu_seqlens_k.diff().max()) if options.texts else 0
    n_prefix = 0 if options.prefix_k is None else len(options.prefix_k)
    return longest + n_prefix > options.window


def attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """See `op.attention`; the causal mask only."""
    if _narrow(options):
        return reference_attention(q, k, v, options)
    # Rows beyond the last text's are padding: 0.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, keys, texts, bias in _runs(options):
        own, own_lse = _flash(
            _heads_first(q[rows], texts),
            _heads_first(k[keys], texts),
            _heads_first(v[keys], texts),
            0.0,
            bias is None,
            attn_mask=None if bias is None else bias.to(q.dtype),
        )
        _heads_first(out[rows], texts).copy_(own)
        _heads_first(lse[rows].unsqueeze(-1), texts).copy_(own_lse.unsqueeze(-1))
    end = int(options.cu_seqlens_q[-1])
    if options.prefix is None or not end:
        return out, lse
    shared, shared_lse = _flash(
        _as_one_text(q[:end]),
        *map(_as_one_text, options.prefix),
        0.0,
        False,
    )
    # out = (out·e^lse + shared·e^shared_lse) / (e^lse + e^shared_lse), without overflow
    own_out, own_lse, shared_lse = out[:end], lse[:end], shared_lse[0].transpose(0, 1)
    share = torch.sigmoid(shared_lse - own_lse).unsqueeze(-1).to(out.dtype)
    torch.lerp(own_out, shared[0].transpose(0, 1), share, out=own_out)
    torch.logaddexp(own_lse, shared_lse, out=own_lse)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the causal mask only.

    With the log-sum-exp over prefix and own keys, each part's backward pass gives its own share of
    the gradient of q, so nothing has to be merged but a sum.
    """
    if _narrow(options):
        return reference_backward(dout, q, k, v, out, lse, options)
    # A text may have fewer queries than keys: what no query sees has no gradient.
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    for rows, keys, texts, bias in _runs(options):
        own_dq, own_dk, own_dv = _flash_backward(
            _heads_first(dout[rows], texts),
            _heads_first(q[rows], texts),
            _heads_first(k[keys], texts),
            _heads_first(v[keys], texts),
            _heads_first(out[rows], texts),
            _heads_first(lse[rows].unsqueeze(-1), texts).squeeze(-1).contiguous(),
            0.0,
            bias is None,
            attn_mask=None if bias is None else bias.to(q.dtype),
        )
        _heads_first(dq[rows], texts).copy_(own_dq)
        _heads_first(dk[keys], texts).copy_(own_dk)
        _heads_first(dv[keys], texts).copy_(own_dv)
    end = int(options.cu_seqlens_q[-1])
    if options.prefix is not None and end:
        shared_dq, _, _ = _flash_backward(
            _as_one_text(dout[:end]),
            _as_one_text(q[:end]),
            *map(_as_one_text, options.prefix),
            _as_one_text(out[:end]),
            lse[:end].T.unsqueeze(0).contiguous(),
            0.0,
            False,
        )
        dq[:end] += shared_dq[0].transpose(0, 1)
    return dq, dk, dv
