"""Timing that survives a noisy machine, and the machine's own peak to compare with."""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


def interleaved(
    providers: dict[str, Callable[[], object]], rounds: int, before_each: Callable[[], None]
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


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow/fast within a round."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def centred_cosine(embeddings: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Cosine [n] after the truth's mean is taken from both: plain cosine hides damage."""
    a, b = (x - truth.mean(0) for x in (embeddings, truth))
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


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
