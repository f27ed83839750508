"""Times tiles of attention's three Triton kernels on this GPU: which should be pinned first.

    python bench/kernels/sweep.py [--kernel NAME ...] [--size D ...] [--json FILE] [--dry-run]

A tile is BLOCK_Q x BLOCK_K, warps, stages; its score is the mean over the cases of its time over
the fastest tile's. Short texts take other tiles than long ones: `in use` names the cases, of which
"medium" is at the bound between them (SHORT in triton_tiles.py). Printed best first; `error` is
against the results of the tile in use. --dry-run runs two tiles on tiny texts in Triton's
interpreter, to check this script.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from triton.errors import TritonError  # noqa: E402

from gen_fast.ops import gpu  # noqa: E402
from gen_fast.ops.attention import (  # noqa: E402
    AttentionOptions,
    triton_backward,
    triton_kernel,
    triton_tiles,
)
from gen_fast.ops.gpu import Tile  # noqa: E402
from gen_fast.testing import relative_error  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
HEADS = {64: (9, 3), 128: (16, 8)}  # of SmolLM2-135M and Qwen3-0.6B: queries, keys
RAGGED = [20, 33, 60, 75, 90, 120, 150, 200, 240, 300, 340, 420]
CASES = {"short": [32] * 512, "medium": [128] * 128, "ragged": RAGGED * 8, "long": [2048] * 8}
if DRY:
    CASES = {"tiny": [3, 20]}
TILES = {
    ("forward", 64): [
        *((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 4, 4)),
        *((128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4)),
    ],
    ("forward", 128): [
        *((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 3)),
        *((128, 32, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3)),
    ],
    ("queries", 64): [
        *((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2), (128, 64, 8, 2)),
        *((128, 64, 8, 3), (128, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 2)),
    ],
    ("queries", 128): [
        *((64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)),
        *((128, 64, 8, 2), (128, 32, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2)),
    ],
    ("keys", 64): [
        *((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 3)),
        *((32, 128, 4, 2), (32, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 3)),
    ],
    ("keys", 128): [
        *((64, 64, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
        *((32, 128, 8, 3), (32, 64, 4, 2), (32, 64, 8, 3), (16, 128, 8, 3)),
    ],
}


# Where each kernel's tile is chosen.
CHOICES = {
    "forward": (triton_kernel, "_tiles"),
    "queries": (triton_backward, "_query_tiles"),
    "keys": (triton_backward, "_key_tiles"),
}


def launch_of(
    kernel: str, size: int, lengths: list[int], tile: Tile | None = None
) -> tuple[Callable[[], None], Tile, tuple]:
    """A kernel's launch with `tile`, or else the pinned one; that tile, and what it fills."""
    launched = {}

    def record(launched_kernel, grid, tiles, key, *arguments, **constants):
        def run() -> None:
            launched_kernel[grid](*arguments, **constants, **tiles[0].constants())

        run()
        launched[launched_kernel.fn.__name__.removeprefix("_attention_")] = run, tiles[0]

    torch.manual_seed(0)
    heads, kv_heads = HEADS[size]
    fused = torch.randn(sum(lengths), 2 * heads + 2 * kv_heads, size, device=DEVICE).bfloat16()
    q, grad, k, v = fused.split([heads, heads, kv_heads, kv_heads], dim=1)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    options = AttentionOptions(cu_seqlens, cu_seqlens)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu, "launch_tiled", record))
        if tile is not None:
            stack.enter_context(mock.patch.object(*CHOICES[kernel], lambda *arguments: (tile,)))
        out, lse = triton_kernel.attention(q, k, v, options)
        dq, dk, dv = triton_backward.attention_backward(grad, q, k, v, out, lse, options)
    filled = {"forward": (out, lse), "queries": (dq,), "keys": (dk, dv)}
    return *launched[kernel], filled[kernel]


def microseconds(run: Callable[[], object]) -> float:
    """Median, with a cold L2 cache."""
    if DRY:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return 1e3 * do_bench(run, rep=50, return_mode="median")


def sweep(kernel: str, size: int) -> list[dict]:
    """A row a tile that fits, best first."""
    pinned = {case: launch_of(kernel, size, lengths)[1:] for case, lengths in CASES.items()}
    used = {
        case: (*tile.blocks.values(), tile.warps, tile.stages) for case, (tile, _) in pinned.items()
    }
    rows: dict[tuple[int, ...], dict] = {}
    skipped = set()
    for case, lengths in CASES.items():
        for values in dict.fromkeys((*used.values(), *TILES[kernel, size][: 2 if DRY else None])):
            try:
                run, _, filled = launch_of(kernel, size, lengths, triton_tiles.tile(*values))
                error = max(map(relative_error, filled, pinned[case][1]))
                taken = microseconds(run)
            except (TritonError, RuntimeError) as failure:
                print(f"{kernel} {size} {values}: {type(failure).__name__}: {failure}"[:200])
                skipped.add(values)
                continue
            new = {"kernel": kernel, "size": size, "tile": values, "us": {}, "error": 0.0}
            row = rows.setdefault(values, {**new, "used": [c for c in used if used[c] == values]})
            row["us"][case] = taken
            row["error"] = max(row["error"], error)
    fitting = [row for values, row in rows.items() if values not in skipped]
    for row in fitting:
        best = {case: min(other["us"][case] for other in fitting) for case in CASES}
        row["score"] = statistics.mean(row["us"][case] / best[case] for case in CASES)
    return sorted(fitting, key=lambda row: row["score"])


def main() -> None:
    """Print and write the rows of each kernel and head size as soon as they are there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    kernels = list(dict.fromkeys(kernel for kernel, _ in TILES))
    parser.add_argument("--kernel", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--size", nargs="+", type=int, choices=HEADS, default=list(HEADS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        sys.exit("sweep: there is no CUDA GPU here; nothing was timed")
    report = {"gpu": "none" if DRY else torch.cuda.get_device_name(), "torch": torch.__version__}
    report |= {"command": " ".join(sys.argv), "rows": []}
    for size in args.size:
        for kernel in args.kernel:
            for row in sweep(kernel, size):
                times = ", ".join(f"{case} {us:.0f} us" for case, us in row["us"].items())
                print(
                    f"{kernel:<8}{size:4} {row['tile']!s:<20} {row['score']:.3f}: {times},"
                    f" error {row['error']:.1e}"
                    f"{', in use for ' * bool(row['used'])}{', '.join(row['used'])}",
                    flush=True,
                )
                report["rows"].append(row)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
