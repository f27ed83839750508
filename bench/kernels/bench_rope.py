"""Rotary embedding of the query and key heads."""

import pytest
import torch
from conftest import DTYPES, HEAD_DIM, HEADS, KV_HEADS, ROWS

from gen_fast.ops.rope import OP, rope
from gen_fast.ops.rope.reference import rope as reference


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", DTYPES)
def bench_rope(measure, dtype, impl):
    # A view of the fused projection, as the backbone passes it.
    fused = torch.randn(ROWS, HEADS + 2 * KV_HEADS, HEAD_DIM).to(DTYPES[dtype])
    angles = torch.randn(ROWS, HEAD_DIM // 2)
    x = fused[:, : HEADS + KV_HEADS]
    measure(
        lambda *inputs: rope(*inputs, impl=impl),
        reference,
        (x, angles.cos(), angles.sin()),
        moved_bytes=2 * x.numel() * x.element_size() + 2 * angles.nbytes,
        flops=3 * x.numel(),
    )
