"""Dropout of rows, chosen by a counter-based generator."""

import torch
from conftest import DEVICE, cases, provided, random, rows_of

from gen_fast.ops.dropout import OP, dropout
from gen_fast.ops.dropout.reference import dropout as plain

TEXT = 64  # tokens
SHARE, SEED, STREAM = 0.05, 1, 0


@cases(OP)
def bench_dropout(measure, size, dtype, mode, provider):
    trained = mode != "forward"
    rows = rows_of(size, size.hidden, dtype)
    x = random(rows, size.hidden, dtype=dtype, grad=trained)
    place = torch.arange(rows, device=DEVICE)
    measure(
        provided(provider, dropout, plain),
        plain,
        (x, place // TEXT, place % TEXT, SHARE, SEED, STREAM),
        moved_bytes=2 * x.nbytes * (1 + trained),
        # Ten rounds of two multiplications and four xors make four elements.
        flops=x.numel() * 15 * (1 + trained),
    )
