"""Residual add + RMSNorm."""

import pytest
import torch
from conftest import DTYPES, HIDDEN, ROWS

from gen_fast.ops.norm import OP, add_rms_norm
from gen_fast.ops.norm.reference import add_rms_norm as reference


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", DTYPES)
def bench_norm(measure, dtype, impl):
    x, residual = torch.randn(2, ROWS, HIDDEN).to(DTYPES[dtype])
    weight = torch.ones(HIDDEN, dtype=DTYPES[dtype])
    measure(
        # The stream grows with each timed call; its values do not change the work.
        lambda *inputs: add_rms_norm(*inputs, 1e-5, impl=impl)[0],
        lambda *inputs: reference(*inputs, 1e-5)[0],
        (x, residual * 0, weight),
        moved_bytes=4 * x.nbytes,
        flops=5 * x.numel(),
    )
