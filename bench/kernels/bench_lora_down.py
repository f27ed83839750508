"""LoRA's way down to rank 16 from the input of queries, keys and values, thinned by dropout."""

import torch
from conftest import DEVICE, cases, provided, random, rows_of

from gen_fast.ops.lora_down import OP, Dropped, lora_down
from gen_fast.ops.lora_down.reference import lora_down as reference

TEXT = 64  # tokens
SHARE, SEED, STREAMS = 0.05, 1, (0, 1, 2)
RANK = 16


@cases(OP)
def bench_lora_down(measure, size, dtype, mode, provider):
    trained = mode != "forward"
    rows = rows_of(size, size.hidden, dtype)
    x = random(rows, size.hidden, dtype=dtype, grad=trained)
    a = random(len(STREAMS) * RANK, size.hidden, dtype=dtype, scale=0.1, grad=trained)
    place = torch.arange(rows, device=DEVICE)
    inner = rows * len(a) * x.element_size()
    measure(
        provided(provider, lora_down, reference),
        reference,
        (x, a, Dropped(place // TEXT, place % TEXT, SHARE, SEED, STREAMS)),
        # Forward x is read; back it is read again, and its gradient is written.
        moved_bytes=x.nbytes + inner + trained * (2 * x.nbytes + inner),
        flops=2 * rows * a.numel() * (1 + 2 * trained),
    )
