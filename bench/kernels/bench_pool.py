"""Final norm and mean of each text's compression tokens, without the projection: a product."""

import torch
from conftest import DEVICE, cases, provided, random, rows_of

from gen_fast.ops.pool import OP, pool
from gen_fast.ops.pool.reference import pool as plain

COMPRESSION = 10  # rows of a text


@cases(OP, modes=("forward",))
def bench_pool(measure, size, dtype, mode, provider):
    rows = rows_of(size, size.hidden, dtype)
    texts = rows // COMPRESSION
    hidden = random(texts * COMPRESSION, size.hidden, dtype=dtype)
    offsets = torch.arange(texts + 1, device=DEVICE, dtype=torch.int32) * COMPRESSION
    norm = random(size.hidden, dtype=dtype)
    measure(
        provided(provider, pool, plain),
        plain,
        (hidden, offsets, norm, 1e-6, None),
        moved_bytes=hidden.nbytes + texts * size.hidden * 4,
        flops=5 * hidden.numel(),
    )
