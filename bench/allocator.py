"""Documents embedded with what the command line asks of the allocator, and without.

    python bench/allocator.py [--processes N] [--rounds N] [--json FILE]

SmolLM2 in bf16, 40 documents. Processes in pairs, as in against.py, but by the median of rounds: in
the fastest ones the allocator had happened to give nothing back.
"""

import statistics
import sys
from pathlib import Path

from against import compare
from measure import arguments, reported, save

KEEPING = "from gen_fast.cli.allocator import keep_freed_memory\nkeep_freed_memory()\n"
WORKER = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import gen_fast, workloads

encoder = gen_fast.load("smollm2-135m", method="mean", dtype="bf16", device="cpu", max_length=1024)
work = workloads.make("documents", encoder.tokenizer, quick=True)
texts = [work.prompt + text for text in work.texts[:40]]
run = lambda: encoder.encode(texts, show_progress_bar=False)
run()
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start, flush=True)
"""


def main() -> None:
    """Print a line."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--processes", type=int, default=5)
    args = parser.parse_args()
    commands = ([sys.executable, "-P", "-c", code] for code in (KEEPING + WORKER, WORKER))
    rows = compare(*commands, args.processes, args.rounds, ("documents",), statistics.median)
    save(args.json, reported(rows))


if __name__ == "__main__":
    main()
