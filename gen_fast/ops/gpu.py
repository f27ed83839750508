"""Launching Triton kernels: where they run, and their tiles.

Importing this module does not import Triton; the kernels of an op are imported when it first runs.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from gen_fast.ops import Case, unsupported

# The architecture whose pinned tiles are taken where there is no GPU to ask: an A100.
DEFAULT_ARCHITECTURE = 80
# The first that computes with fp8 (e4m3).
FP8_SINCE = 89

# Arguments of a kernel that change from batch to batch: without this Triton compiles it anew for 1
# and for multiples of 16.
PER_BATCH = (
    "n_rows",
    "n_texts",
    "n_prefix",
    "window",
    "seed",
    "first_kept",
    "layer",
    "stream",
)


@cache
def missing() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one program at a time: only for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(case: Case) -> str | None:
    """Why Triton's kernels cannot compute `case`, or None.

    On a CPU they run in the interpreter, and only if asked for: it is an emulation.
    """
    if case.device == "cpu" and case.forced and interpreted():
        return missing()
    return (
        unsupported(case, "cuda", (torch.float32, torch.bfloat16, torch.float16))
        or missing()
        or (fp8_missing() if case.option == "fp8" else None)
    )


def fp8_missing() -> str | None:
    """Why the GPUs of this process do not compute in fp8 (e4m3), or None.

    Tensor cores multiply it, and Triton's compiler converts to it, from sm_89 on. The oldest GPU
    decides for all of them.
    """
    oldest = min(map(_capability, range(torch.cuda.device_count())), default=FP8_SINCE)
    return None if oldest >= FP8_SINCE else f"needs sm_{FP8_SINCE} for fp8, not sm_{oldest}"


@dataclass(frozen=True)
class Tile:
    """A launch configuration. `blocks` are the kernel's BLOCK_* constants."""

    blocks: Mapping[str, int]
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


def deferred(module: str, function: str) -> Callable[..., Any]:
    """A function of `gen_fast.ops.<module>`, which imports Triton: imported when it first runs."""

    @cache
    def loaded() -> Callable[..., Any]:
        run: Callable[..., Any] = getattr(
            importlib.import_module(f"gen_fast.ops.{module}"), function
        )
        return run

    return lambda *args, **options: loaded()(*args, **options)


def blocks_over(**sizes: int) -> Callable[[Mapping[str, int]], tuple[int, ...]]:
    """A grid whose axes cover `sizes`, each cut by the constant that it is given as."""
    return lambda constants: tuple(-(-size // constants[name]) for name, size in sizes.items())


def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
    """Run a Triton kernel over `grid`, a tuple or a function of the constants."""
    kernel[grid](*arguments, **constants)


def launch_rows(
    kernel: Any, shape: tuple[int, int], *arguments: Any, least_warps: int = 1, **constants: Any
) -> None:
    """Run a kernel that keeps a row in registers: one program for each row of `shape` (rows, size).

    BLOCK and the warps follow from the size of a row. A kernel with the constant PARTS has the row
    as a matrix [PARTS, size / PARTS] in [PARTS, BLOCK]. Nothing is run for no rows.
    """
    rows, size = shape
    if rows and size:
        parts = constants.get("PARTS", 1)
        block = power_of_two(size // parts)
        warps = max(least_warps, row_warps(parts * block))
        launch(kernel, (rows,), *arguments, **constants, BLOCK=block, num_warps=warps)


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
    if os.environ.get("GEN_FAST_AUTOTUNE") == "1":
        _autotuned(kernel, tuple(key), _configs(tiles))[grid](*arguments, **constants)
        return
    launch(kernel, grid, *arguments, **constants, **tiles[0].constants())


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
    """Whose pinned tiles fit `device`, by the shared memory that a block can have.

    90's need up to 227 KiB, 80's up to 163 KiB, 86's up to 99 KiB, which all others since sm_80
    have (CUDA C++ Programming Guide, table of technical specifications by compute capability).
    """
    own = architecture(device)
    if own in (90, 100, 103):
        return 90
    return 80 if own in (80, 87) else 86


def architecture(device: torch.device) -> int:
    """Compute capability as one number: 80 for an A100, 90 for an H100 or H200."""
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
