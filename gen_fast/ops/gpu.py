"""Launching Triton kernels: where they run, their tiles, and recording them to compile elsewhere.

Importing this module does not import Triton; the kernels of an op are imported when it first runs.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from gen_fast.errors import ImplementationError

# The architecture whose pinned tiles are taken where there is no GPU to ask: an A100.
DEFAULT_ARCHITECTURE = 80
# The first whose Triton kernels can store fp8 (e4m3).
FP8_SINCE = 89

# Arguments of a kernel that change from batch to batch: without this Triton compiles it anew for 1
# and for multiples of 16.
PER_BATCH = ("n_rows", "n_texts", "n_prefix", "window")


@cache
def missing() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one program at a time: only for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# What every Triton kernel takes: arguments of Op.register.
ON_GPU: dict[str, Any] = {
    "devices": ("cuda",),
    "dtypes": (torch.float32, torch.bfloat16, torch.float16),
    "only_forced": ("cpu",) if interpreted() else (),
    "missing": missing,
}


def refuses_fp8(device: str, variant: str) -> str | None:
    """Why Triton cannot quantise to fp8 on the GPUs of this process, or None.

    Its compiler converts to e4m3 from sm_89 on. The oldest GPU decides for all of them.
    """
    if variant != "fp8" or device != "cuda":
        return None
    oldest = min(map(_capability, range(torch.cuda.device_count())), default=FP8_SINCE)
    return None if oldest >= FP8_SINCE else f"needs sm_{FP8_SINCE} for fp8, not sm_{oldest}"


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what a compiler needs to know, and nothing run."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


@dataclass(frozen=True)
class Tile:
    """A launch configuration. `blocks` are the kernel's BLOCK_* constants."""

    blocks: Mapping[str, int]
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


@dataclass
class _Recording:
    architecture: int
    every_tile: bool
    launches: list[Launch]


_recording: _Recording | None = None


@contextmanager
def recording(architecture: int, *, every_tile: bool = False) -> Iterator[list[Launch]]:
    """Collect launches instead of making them, with the tiles of `architecture` (80, 90, …).

    every_tile: each pinned tile is a launch, not only the first.
    """
    global _recording
    if _recording is not None:
        raise ImplementationError("launches are being recorded already")
    _recording = _Recording(architecture, every_tile, [])
    try:
        yield _recording.launches
    finally:
        _recording = None


def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
    """Run a Triton kernel over `grid`, a tuple or a function of the constants."""
    if _recording is not None:
        _recording.launches.append(Launch(kernel, arguments, constants))
        return
    kernel[grid](*arguments, **constants)


def launch_tiled(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    tiles: Sequence[Tile],
    key: Sequence[str],
    *arguments: Any,
    **constants: Any,
) -> None:
    """Run a kernel with the first of `tiles`, which are ordered best first for this GPU.

    With GEN_FAST_AUTOTUNE=1 Triton measures all of them, once for each value of the arguments
    named by `key`; without it a run repeats the one before, to the bit and to the microsecond.
    """
    if os.environ.get("GEN_FAST_AUTOTUNE") == "1" and _recording is None:
        _autotuned(kernel, tuple(key), _configs(tiles))[grid](*arguments, **constants)
        return
    every = _recording is not None and _recording.every_tile
    for tile in tiles if every else tiles[:1]:
        launch(kernel, grid, *arguments, **constants, **tile.constants())


def _configs(tiles: Sequence[Tile]) -> tuple[tuple[tuple[tuple[str, int], ...], int, int], ...]:
    return tuple((tuple(tile.blocks.items()), tile.warps, tile.stages) for tile in tiles)


@cache
def _autotuned(kernel: Any, key: tuple[str, ...], configs: tuple[Any, ...]) -> Any:
    import triton

    return triton.autotune(
        [
            triton.Config(dict(b), num_warps=warps, num_stages=stages)
            for b, warps, stages in configs
        ],
        key=list(key),
    )(kernel)


def tile_architecture(device: torch.device) -> int:
    """Whose pinned tiles fit `device`: 90's where a block has 227 KiB of shared memory, else 80's.

    Those need less than 99 KiB, which all others since sm_80 have (CUDA C++ Programming Guide,
    table of technical specifications by compute capability).
    """
    return 90 if architecture(device) in (90, 100, 103) else 80


def architecture(device: torch.device) -> int:
    """Compute capability as one number: 80 for an A100, 90 for an H100 or H200."""
    if _recording is not None:
        return _recording.architecture
    return _capability(device.index) if device.type == "cuda" else DEFAULT_ARCHITECTURE


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 16."""
    return 1 << max(4, (n - 1).bit_length())


def row_warps(block: int) -> int:
    """Warps for a kernel that keeps a row of `block` elements in registers: 8 or 16 a thread."""
    return min(16, max(1, block // 512))
