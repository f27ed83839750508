"""Rotary embedding of the query and key heads, with Qwen3's norm where the model has it."""

import torch
from conftest import DEVICE, cases, provided, random, rows_of

from gen_fast.ops.rope import OP, rope
from gen_fast.ops.rope.reference import rope as reference

EPS = 1e-6


def plain(x, cos, sin, norm):
    return reference(x, cos, sin, norm, EPS)


def liger(size):
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(x, cos, sin, norm):
        """As in Liger's own models: the norm of Qwen3 first, then the rotation of q and k."""
        if norm is not None:
            x = torch.nn.functional.rms_norm(x, (x.shape[-1],), None, EPS) * norm
        q, k = x.transpose(0, 1).unsqueeze(0).split([size.heads, size.kv_heads], dim=1)
        cos, sin = (torch.cat((t, t), -1).unsqueeze(0).to(x.dtype) for t in (cos, sin))
        return torch.cat(LigerRopeFunction.apply(q, k, cos, sin), 1)[0].transpose(0, 1)

    return run


@cases(OP, peers=["liger"])
def bench_rope(measure, size, dtype, mode, provider):
    trained = mode != "forward"
    heads = size.heads + size.kv_heads
    # A view of the fused projection, as the backbone passes it.
    rows = rows_of(size, (heads + size.kv_heads) * size.head_dim, dtype)
    fused = random(rows, heads + size.kv_heads, size.head_dim, dtype=dtype)
    x = fused[:, :heads].requires_grad_(trained)
    angles = torch.arange(rows * size.head_dim // 2, device=DEVICE).float()
    angles = angles.view(rows, -1) % 7
    norm = random(heads, size.head_dim, dtype=dtype) if size.qk_norm else None
    measure(
        provided(
            provider,
            lambda *a, impl: rope(*a, EPS, inplace=not trained, impl=impl),
            plain,
            {"liger": liger(size)} if provider == "liger" else None,
        ),
        plain,
        (x, angles.cos(), angles.sin(), norm),
        # Read and written, also of the gradient, and the norm's gradient reads x once more.
        moved_bytes=2 * (2 if trained else 1) * (x.numel() * x.element_size() + angles.nbytes)
        + (trained and size.qk_norm) * x.numel() * x.element_size(),
        flops=x.numel() * (3 + 5 * size.qk_norm) * (2 if trained else 1),
    )
