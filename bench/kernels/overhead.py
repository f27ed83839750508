"""Microseconds of one call with one row: what choosing an implementation and calling it costs.

    python bench/kernels/overhead.py [--json FILE]

Each op is called as the backbone calls it, and through the dispatcher as torch.ops.gen_fast.*.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gen_fast.ops.append import OP as APPEND
from gen_fast.ops.attention import OP as ATTENTION
from gen_fast.ops.attention import AttentionOptions
from gen_fast.ops.norm import OP as NORM
from gen_fast.ops.pool import OP as POOL
from gen_fast.ops.rope import OP as ROPE
from gen_fast.ops.swiglu import OP as SWIGLU

HIDDEN, HEAD_DIM = 64, 16


def calls() -> dict[str, tuple]:
    """Each op with the arguments of a one-row call."""
    row, weight = torch.ones(1, HIDDEN), torch.ones(HIDDEN)
    offsets, ids = torch.tensor([0, 1]).int(), torch.tensor([3])
    heads, angles = torch.ones(1, 4, HEAD_DIM), torch.ones(1, HEAD_DIM // 2)
    return {
        "append": (APPEND, torch.ones(9, HIDDEN), row, ids),
        "norm": (NORM, row, row.clone(), weight, 1e-6),
        "rope": (ROPE, heads, angles, angles, None, 1e-6),
        "attention": (ATTENTION, heads, heads, heads, AttentionOptions(offsets, offsets)),
        "swiglu": (SWIGLU, row),
        "pool": (POOL, row, offsets, weight, 1e-6, None),
    }


def microseconds(run: Callable[[], object]) -> float:
    """A call's time in the fastest of 500 batches of 40 calls: what else runs only adds to it."""
    times = []
    for _ in range(500):
        start = time.perf_counter()
        for _ in range(40):
            run()
        times.append((time.perf_counter() - start) / 40)
    return 1e6 * min(times)


def main() -> None:
    """Print a line an op."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for name, (op, *arguments) in calls().items():
            direct = microseconds(lambda op=op, a=arguments: op(*a))
            dispatched = microseconds(lambda op=op, a=arguments: op.torch_op(*op.flat(a)))
            rows.append({"op": name, "direct_us": direct, "dispatched_us": dispatched})
            print(f"{name:<10} {direct:6.2f} us, through the dispatcher {dispatched:6.2f} us")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
