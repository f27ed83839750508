"""Microbenchmarks of the ops: `pytest bench/kernels --benchmark-json FILE`.

A case is timed only if its result passes the op's tolerance against float64. Every row carries
its implementation, dtype, shape, the bytes and FLOPs of the op, and the share of the roofline it
reaches against the copy bandwidth and matmul peak of this machine, measured in the same run.
"""

import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from gen_fast.device import matmul_peak
from gen_fast.testing import assert_no_worse

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# SmolLM2-135M: hidden 576, 9 query and 3 key/value heads of 64, feed-forward 1,536; a CPU batch.
ROWS = 2048
HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 576, 1536, 9, 3, 64


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a copy far larger than the caches."""
    source = torch.ones(1 << 27)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


@pytest.fixture(scope="session")
def peaks() -> dict[torch.dtype, float]:
    """Matmul FLOP/s of each dtype."""
    return {dtype: matmul_peak(dtype) for dtype in DTYPES.values()}


@pytest.fixture
def measure(benchmark, copy_bandwidth, peaks, request):
    """Check, then time; `run` is the implementation, `reference` the plain one at any dtype."""

    def inner(
        run: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        *,
        moved_bytes: int,
        flops: int,
    ) -> None:
        with torch.inference_mode():
            wide = [x.double() if x.is_floating_point() else x for x in inputs]
            copies = [x.clone() for x in inputs]
            assert_no_worse(run(*copies), reference(*inputs), reference(*wide))
            benchmark.extra_info.update(
                op=request.node.path.stem.removeprefix("bench_"),
                provider=request.node.callspec.params["impl"],
                dtype=str(inputs[0].dtype).removeprefix("torch."),
                bytes=moved_bytes,
                flops=flops,
            )
            benchmark(run, *inputs)
        if benchmark.stats is not None:
            bound = max(moved_bytes / copy_bandwidth, flops / peaks[inputs[0].dtype])
            benchmark.extra_info["roofline_share"] = bound / benchmark.stats.stats.median

    return inner
