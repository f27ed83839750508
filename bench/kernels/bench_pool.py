"""Final norm and mean of each text's compression tokens, and the projection of the means."""

import torch
from conftest import DEVICE, cases, provided, random

from gen_fast.ops.pool import OP, pool
from gen_fast.ops.pool.reference import pool as plain_pool

COMPRESSION, TEACHER = 10, 384  # rows of a text, and the width of its embedding


def plain(hidden, offsets, norm, eps, weights, projection, bias):
    mean = plain_pool(hidden, offsets, norm, eps, weights)
    return torch.nn.functional.linear(mean, *(x.to(mean.dtype) for x in (projection, bias)))


@cases(OP, modes=("forward",))
def bench_pool(measure, size, dtype, mode, provider):
    texts = size.rows // 8
    hidden = random(texts * COMPRESSION, size.hidden, dtype=dtype)
    offsets = torch.arange(texts + 1, device=DEVICE, dtype=torch.int32) * COMPRESSION
    norm = random(size.hidden, dtype=dtype)
    projection = random(TEACHER, size.hidden, dtype="fp32", scale=0.05)
    bias = random(TEACHER, dtype="fp32")
    measure(
        provided(provider, pool, plain),
        plain,
        (hidden, offsets, norm, 1e-6, None, projection, bias),
        moved_bytes=hidden.nbytes + projection.nbytes + texts * TEACHER * 4,
        flops=5 * hidden.numel() + 2 * texts * size.hidden * TEACHER,
    )
