"""Timing that survives a noisy machine, and the machine's own peak to compare with."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleaved(
    providers: dict[str, Callable[[], object]],
    rounds: int,
    before_each: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each provider in each round; one round runs every provider once, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(rounds):
        for name, run in providers.items():
            before_each()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments(
    about: str | None,
    *,
    rounds: int | None = None,
    dtype: bool = False,
    quick: str | None = None,
    plots: str | None = None,
) -> argparse.ArgumentParser:
    """A benchmark's arguments: --json FILE, and those of the others that it has.

    about: its docstring. rounds: the default of --rounds. dtype: whether --dtype takes some of
    DTYPES. quick, plots: what --quick leaves out, and what goes to --plots DIR.
    """
    assert about is not None
    parser = argparse.ArgumentParser(description=about.split("\n", 1)[0])
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds)
    if dtype:
        parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    if quick is not None:
        parser.add_argument("--quick", action="store_true", help=quick)
    if plots is not None:
        parser.add_argument("--plots", type=Path, help=f"directory for {plots}")
    parser.add_argument("--json", type=Path)
    return parser


def reported(rows: list[dict], **more: Any) -> dict[str, Any]:
    """What goes into a file of results: machine, command and rows."""
    return {"machine": machine(), "command": " ".join(sys.argv), **more, "rows": rows}


def save(path: Path | None, report: Any) -> None:
    """Write what was measured as JSON, if a file was asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


def peak_memory_mb() -> float:
    """The most memory that this process has held, file pages among it, in MiB; of Linux."""
    # Not getrusage: its maximum survives fork and exec, so a child reports its parent's.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


def points(seconds: dict[str, list[float]], **case: Any) -> list[dict[str, Any]]:
    """A row a provider of `interleaved`, of this case, with its median of seconds."""
    return [
        {**case, "provider": name, "seconds": statistics.median(times)}
        for name, times in seconds.items()
    ]


def profile(run: Callable[[], object], seconds: float, device: str, table: Path) -> None:
    """Write where the time of `seconds` of `run` goes, by kernel and by operation, to `table`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as recorded:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            run()
            if device == "cuda":
                torch.cuda.synchronize()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    lines = recorded.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=90)
    table.write_text(lines + "\n")


def product_tflops(shapes: dict[str, tuple[int, int]], rows: int, device: str) -> dict[str, float]:
    """TFLOP/s of x [rows, in] times weightᵀ [in, out] in bf16, by torch's own product.

    shapes: (out, in) of each. The best of five runs of ten, after one that warms up.
    """
    speeds = {}
    for name, (wide, deep) in shapes.items():
        x = torch.randn(rows, deep, device=device).to(torch.bfloat16)
        weight = torch.randn(wide, deep, device=device).to(torch.bfloat16)
        seconds = []
        for _ in range(6):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                torch.nn.functional.linear(x, weight)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / 10)
        speeds[name] = 2e-12 * rows * wide * deep / min(seconds[1:])
    return speeds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow/fast within a round."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def commit() -> str:
    """$GEN_FAST_COMMIT, for copies without a repository; else what git says; else nothing."""
    named = os.environ.get("GEN_FAST_COMMIT")
    if named:
        return named
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
        )  # fmt: skip
    except OSError:  # there is no git
        return ""
    return done.stdout.strip()


def machine() -> dict[str, str | int]:
    """What a figure was measured on."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
