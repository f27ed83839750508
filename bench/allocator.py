"""Encoding and a training step with what the command line asks of the allocator, and without.

    python bench/allocator.py [--processes N] [--rounds N] [--json FILE]

Side by side, as in against.py.
"""

import argparse
import json
import sys
from pathlib import Path

from against import WORKER, compare
from measure import machine

KEEPING = "from gen_fast.cli.allocator import keep_freed_memory\nkeep_freed_memory()\n"


def main() -> None:
    """Print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    commands = ([sys.executable, "-P", "-c", code] for code in (KEEPING + WORKER, WORKER))
    rows = compare(*commands, args.processes, args.rounds)
    if args.json:
        args.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
