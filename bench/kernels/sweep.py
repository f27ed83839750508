"""Times tiles of attention's three Triton kernels on this GPU: what `_tiles` should take first.

    python bench/kernels/sweep.py [--kernel NAME ...] [--size D ...] [--json FILE] [--dry-run]

A tile is BLOCK_Q x BLOCK_K, warps, stages; its score is the mean over the cases of its time over
the fastest tile's. Printed best first; `error` is against the results of the tile in use. --dry-run
runs two tiles on tiny texts in Triton's interpreter, to check this script.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from triton.errors import TritonError  # noqa: E402

from gen_fast.ops import gpu  # noqa: E402
from gen_fast.ops.attention import AttentionOptions, triton_backward, triton_kernel  # noqa: E402
from gen_fast.ops.gpu import Tile  # noqa: E402
from gen_fast.testing import relative_error  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
HEADS = {64: (9, 3), 128: (16, 8)}  # of SmolLM2-135M and Qwen3-0.6B: queries, keys
RAGGED = [20, 33, 60, 75, 90, 120, 150, 200, 240, 300, 340, 420]
CASES = {"short": [32] * 512, "ragged": RAGGED * 8, "long": [2048] * 8}
if DRY:
    CASES = {"tiny": [3, 20]}
TILES = {
    ("forward", 64): [
        *((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 4, 4)),
        *((128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4)),
    ],
    ("forward", 128): [
        *((128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 32, 8, 3)),
        *((128, 32, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2)),
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


def launches(size: int, lengths: list[int]) -> dict[str, tuple[Callable, Tile, tuple]]:
    """Each kernel's launch by tile, the tile in use, and the tensors that the launch fills."""
    launched = {}

    def record(kernel, grid, tiles, key, *arguments, **constants):
        def run(tile: Tile) -> None:
            kernel[grid](*arguments, **constants, **tile.constants())

        run(tiles[0])
        launched[kernel.fn.__name__.removeprefix("_attention_")] = run, tiles[0]

    torch.manual_seed(0)
    heads, kv_heads = HEADS[size]
    fused = torch.randn(sum(lengths), 2 * heads + 2 * kv_heads, size, device=DEVICE).bfloat16()
    q, grad, k, v = fused.split([heads, heads, kv_heads, kv_heads], dim=1)
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    options = AttentionOptions(offsets, offsets)
    with mock.patch.object(gpu, "launch_tiled", record):
        out, lse = triton_kernel.attention(q, k, v, options)
        dq, dk, dv = triton_backward.attention_backward(grad, q, k, v, out, lse, options)
    filled = {"forward": (out, lse), "queries": (dq,), "keys": (dk, dv)}
    return {name: (*launched[name], filled[name]) for name in launched}


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
    rows: dict[tuple[int, ...], dict] = {}
    skipped = set()
    for case, lengths in CASES.items():
        run, current, filled = launches(size, lengths)[kernel]
        expected = [x.clone() for x in filled]
        used = (*current.blocks.values(), current.warps, current.stages)
        for values in dict.fromkeys((used, *TILES[kernel, size][: 2 if DRY else None])):
            tile = triton_kernel.tile(*values)
            for x in filled:
                x.zero_()
            try:
                run(tile)
                error = max(map(relative_error, filled, expected))
                taken = microseconds(lambda run=run, tile=tile: run(tile))
            except (TritonError, RuntimeError) as failure:
                print(f"{kernel} {size} {values}: {type(failure).__name__}: {failure}"[:200])
                skipped.add(values)
                continue
            new = {"kernel": kernel, "size": size, "tile": values, "used": values == used, "us": {}}
            row = rows.setdefault(values, {**new, "error": 0.0})
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
                    f" error {row['error']:.1e}{', in use' * row['used']}",
                    flush=True,
                )
                report["rows"].append(row)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
