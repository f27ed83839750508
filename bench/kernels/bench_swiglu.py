"""Gated activation."""

import pytest
import torch
from conftest import DTYPES, FEED_FORWARD, ROWS

from gen_fast.ops.swiglu import OP, swiglu
from gen_fast.ops.swiglu.reference import swiglu as reference


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", DTYPES)
def bench_swiglu(measure, dtype, impl):
    gate_up = torch.randn(ROWS, 2 * FEED_FORWARD).to(DTYPES[dtype])
    measure(
        lambda x: swiglu(x, impl=impl),
        reference,
        (gate_up,),
        moved_bytes=gate_up.nbytes * 3 // 2,
        flops=15 * gate_up.numel() // 2,
    )
