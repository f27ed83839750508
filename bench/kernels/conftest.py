"""Microbenchmarks of the ops: `pytest bench/kernels --benchmark-json FILE`, then `table.py FILE`.

--rows FILE appends each row as it is made, a line of JSON: an interrupted run keeps them.

Cases are sizes of a model, dtypes and modes; providers are the reference as it stands and under
torch.compile, every implementation, and other people's kernels where they are installed. A case is
timed only if its result passes the op's tolerance against float64. Every row carries the bytes and
FLOPs of the op and the share it reaches of the roofline: the time that moving the bytes at memory
bandwidth or computing at the matmul peak would take, both measured in the same run. On a GPU a case
is timed as the replay of a CUDA graph (`timed: graph`), because Python takes longer than many of
these kernels do; where the provider cannot be captured, call by call (`timed: calls`).
"""

import ctypes
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gen_fast.model.device import matmul_peak
from gen_fast.ops import Op
from gen_fast.testing import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Size:
    """A model's sizes and the rows of a batch on a GPU: enough to leave its L2 cache."""

    rows: int  # on a CPU see `rows_of`
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    qk_norm: bool


SIZES = {
    "cpu": {"smollm2-135m": Size(2048, 576, 1536, 9, 3, 64, 49152, False)},
    "cuda": {
        "qwen3-0.6b": Size(65536, 1024, 3072, 16, 8, 128, 151936, True),
        "qwen3-8b": Size(16384, 4096, 12288, 32, 8, 128, 151936, True),
    },
}[DEVICE]


# The largest input of a case on a CPU. With its results that is several times a last-level cache of
# 32 MiB: what stays in the cache between two runs looks faster than memory is.
CPU_BYTES = 80 << 20


def rows_of(size: Size, width: int, dtype: str) -> int:
    """Rows of the case's largest input [rows, width]: on a CPU as many as exceed its caches."""
    if DEVICE == "cuda":
        return size.rows
    return CPU_BYTES // (width * DTYPES[dtype].itemsize)


# Other people's kernels: provider -> package. They need a GPU.
PEERS = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}


def pytest_configure() -> None:
    """Have glibc keep large blocks: else each result is fresh memory, and page faults are timed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if DEVICE == "cpu" and mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: none goes back to the system


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where rows go as they are made."""
    parser.addoption("--rows", type=Path, help="append a line of JSON for each row to this file")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What else a time depends on, once a file."""
    machine_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}


def cases(
    op: Op, modes: Sequence[str] = MODES, peers: Sequence[str] = (), others: Sequence[str] = ()
) -> Any:
    """Decorate a benchmark of `op` with (size, dtype, mode, provider).

    others: providers that are neither implementations nor packages.
    """
    names = op.implementations(DEVICE)
    others = [
        *others,
        *(p for p in peers if DEVICE == "cuda" and importlib.util.find_spec(PEERS[p])),
    ]
    dtypes = list(DTYPES) if DEVICE == "cpu" else ["bf16"]
    parameters = []
    for size in SIZES:
        for dtype in dtypes:
            for mode in modes:
                backward = op.backward.implementations(DEVICE) if op.backward else []
                able = names if mode == "forward" else [n for n in names if n in backward]
                # Compiling takes seconds each: on a GPU, whose time is limited, for one size only.
                compiled = ["torch.compile"] if DEVICE == "cpu" or size == next(iter(SIZES)) else []
                for provider in [*able, *compiled, *others]:
                    parameters.append(
                        pytest.param(
                            SIZES[size],
                            dtype,
                            mode,
                            provider,
                            id=f"{size}-{dtype}-{mode}-{provider}",
                        )
                    )
    return pytest.mark.parametrize(("size", "dtype", "mode", "provider"), parameters)


def random(*shape: int, dtype: str, scale: float = 1.0, grad: bool = False) -> Tensor:
    """Normal draws, made on the device, the same every time."""
    return draws(shape, DTYPES[dtype]).mul_(scale).requires_grad_(grad)


def draws(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)


def provided(
    provider: str,
    op: Callable[..., Any],
    plain: Callable[..., Any],
    peers: Mapping[str, Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """What to run: one of `peers` by name, the plain function compiled, or `op` forced."""
    if peers and provider in peers:
        return peers[provider]
    if provider == "torch.compile":
        return torch.compile(plain, dynamic=False)
    return partial(op, impl=provider)


@pytest.fixture(scope="session")
def bandwidth() -> float:
    """Bytes a second, read plus written, at the cases' size: of a copy, in place, or of a sum.

    A copy on a CPU also reads what it overwrites, which what works in place does not.
    """
    source = torch.ones(CPU_BYTES // 4 if DEVICE == "cpu" else 1 << 29, device=DEVICE)
    target = torch.empty_like(source)
    runs = ((2, lambda: target.copy_(source)), (2, source.neg_), (1, source.sum))
    return max(times * source.nbytes / min(seconds_of(run, 20)) for times, run in runs)


@pytest.fixture(scope="session")
def peaks() -> dict[torch.dtype, float]:
    """Matmul FLOP/s of each dtype."""
    return {dtype: matmul_peak(dtype, DEVICE) for dtype in DTYPES.values()}


def seconds_of(run: Callable[[], object], rounds: int) -> list[float]:
    """Wall-clock seconds of each round; on a GPU as many as fit 0.1 s, with a cold L2 cache."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return [1e-3 * ms for ms in do_bench(run, rep=100, return_mode="all")]
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def as_graph(run: Callable[[], object]) -> Callable[[], None] | None:
    """The replay of a CUDA graph of `run`; None if it waits for the device or is not captured."""
    torch.cuda.set_sync_debug_mode("error")  # a capture that fails half-way would leave traces
    try:
        run()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # what a library sets up for a new stream
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError:
        return None
    return graph.replay


@pytest.fixture(scope="session")
def expected() -> dict[tuple, tuple]:
    """The reference's results of the case at hand, rounded and in float64, for all its providers.

    Inputs are drawn the same each time, so that the results are those of every provider.
    """
    return {}


@pytest.fixture
def measure(benchmark: Any, expected: dict, request: Any):
    """Check, then time `run(*inputs)`; `plain` is the reference, which takes any dtype.

    exact: what results are compared with in float64, `plain` by default; compared: what of the
    results of `run` and `plain` is.
    """

    def inner(
        run: Callable[..., Any],
        plain: Callable[..., Any],
        inputs: Sequence[Any],
        *,
        moved_bytes: int,
        flops: int,
        operand_bytes: int | None = None,
        exact: Callable[..., Any] | None = None,
        compared: Callable[..., tuple[Tensor, ...]] = lambda *outputs: outputs,
    ) -> None:
        parameters = request.node.callspec.params
        trained = parameters["mode"] != "forward"
        upstream: list[Tensor] = []

        def step(function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(trained):
                result = function(*inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            if not trained:
                return outputs
            if not upstream:  # in the check, so that nothing is drawn while time is taken
                upstream.extend(draws(x.shape, x.dtype) for x in outputs)
            grads = [x.to(y.dtype) for x, y in zip(upstream, outputs, strict=True)]
            trained_inputs = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
            return *outputs, *torch.autograd.grad(outputs, trained_inputs, grads)

        results = compared(*step(run, copies(inputs)))
        case = (request.node.originalname, *(v for k, v in parameters.items() if k != "provider"))
        if case not in expected:
            expected.clear()  # those of one case at a time: they are large
            expected[case] = (
                compared(*step(plain, copies(inputs))),
                step(exact or plain, copies(inputs, torch.float64)),
            )
        for i, (actual, rounded, true) in enumerate(zip(results, *expected[case], strict=True)):
            # Behind the outputs come gradients, which are judged as in tests (check_gradients).
            assert_no_worse(actual, rounded, true, cancelling=trained and i >= len(upstream))
        del results, actual, rounded, true
        row = {
            "op": request.node.originalname.removeprefix("bench_"),
            "size": next(name for name, size in SIZES.items() if size == parameters["size"]),
            **{name: parameters[name] for name in ("dtype", "mode", "provider")},
            "case": parameters.get("case", ""),
            "bytes": moved_bytes,
            "flops": flops,
        }
        benchmark.extra_info.update(row)
        benchmark.pedantic(step, (run, inputs), warmup_rounds=2)
        if benchmark.stats is None:  # --benchmark-disable: only the check was wanted
            return
        timed = partial(step, run, inputs)
        graph = as_graph(timed) if DEVICE == "cuda" else None
        rounds = max(5, min(200, int(0.5 / benchmark.stats.stats.median)))
        times = sorted(seconds_of(graph or timed, rounds))
        low, median, high = (times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
        bandwidth, peaks = map(request.getfixturevalue, ("bandwidth", "peaks"))
        dtype = DTYPES[parameters["dtype"]]
        # Of smaller numbers the processors multiply as many more.
        peak = peaks[dtype] * dtype.itemsize / (operand_bytes or dtype.itemsize)
        bound = max(moved_bytes / bandwidth, flops / peak)
        row |= {
            "timed": "graph" if graph else "calls",
            "p20": low,
            "p50": median,
            "p80": high,
            "roofline_share": bound / statistics.median(times),
        }
        benchmark.extra_info.update(row)
        rows = request.config.getoption("--rows")
        if rows:
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")

    return inner


def copies(inputs: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Each tensor anew, those of numbers in `dtype` if it is given."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        leaf = x.detach().clone().to(dtype if x.is_floating_point() else None)
        return leaf.requires_grad_(x.requires_grad)

    return [copy(x) for x in inputs]
