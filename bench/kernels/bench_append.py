"""Embedding of packed ids from two tables."""

import torch
from conftest import DEVICE, cases, provided, random, rows_of

from gen_fast.ops.append import OP, append
from gen_fast.ops.append.reference import append as plain

SPECIAL, TEXT = 20, 64  # special tokens, and tokens of a text with them


@cases(OP)
def bench_append(measure, size, dtype, mode, provider):
    trained = mode != "forward"
    rows = rows_of(size, size.hidden, dtype)
    table = random(size.vocabulary, size.hidden, dtype=dtype)
    special = random(SPECIAL, size.hidden, dtype=dtype, grad=trained)
    ids = torch.arange(rows, device=DEVICE) * 7919 % size.vocabulary
    place = torch.arange(rows, device=DEVICE) % TEXT - (TEXT - SPECIAL)
    ids = torch.where(place < 0, ids, size.vocabulary + place)
    row, of_special = size.hidden * table.element_size(), rows * SPECIAL // TEXT
    # All rows are written. Those of text are read; those of special tokens stay in a cache.
    moved_rows = rows + (rows - of_special + SPECIAL) + trained * of_special
    measure(
        provided(provider, append, plain),
        plain,
        (table, special, ids),
        moved_bytes=moved_rows * row,
        flops=trained * of_special * size.hidden,
    )
