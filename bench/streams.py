"""Batches side by side against one batch on all threads, over one copy of the weights.

    python bench/streams.py [--rounds N] [--texts N] [--dtype ...] [--workload ...] [--json FILE]

The numbers of streams take turns, and so do as many processes of one thread each as there are
threads. What the encoder itself would choose is measured before each workload.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

import numpy as np
import workloads
from measure import arguments, interleaved, median_ratio, reported, save

import gen_fast
from gen_fast.embed.encoder import Encoder
from gen_fast.model.stream_choice import candidates, measure

MODEL = "smollm2-135m"
WORKLOADS = ("queries", "documents")
# A process: the texts as JSON on the first line; then it embeds them once for every line.
WORKER = """
import json, sys
import gen_fast
options = json.loads(sys.stdin.readline())
encoder = gen_fast.load(options["model"], device="cpu", dtype=options["dtype"], streams=1,
                        max_length=options["max_length"])
for _ in sys.stdin:
    encoder.encode(options["texts"], prompt=options["prompt"], show_progress_bar=False)
    print("done", flush=True)
"""


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    args = parser.parse_args()
    rows = [row for w in args.workload for d in args.dtype for row in compare(args, w, d)]
    save(args.json, reported(rows))


def compare(args: argparse.Namespace, workload: str, dtype: str) -> list[dict]:
    """Rows of one workload: seconds of every number of streams, and of processes."""
    encoder = gen_fast.load(MODEL, device="cpu", dtype=dtype, streams=1)
    work = workloads.make(workload, encoder.tokenizer, quick=args.texts <= 240)
    texts = work.texts[: args.texts]
    counts = candidates(encoder.backbone, encoder.budget.tokens)
    choices = [measure(encoder.backbone, encoder.budget.tokens, counts) for _ in range(3)]
    chosen = statistics.median_low(choice.count for choice in choices)
    print(workload, dtype, "the encoder's own measurement, three times:", *choices, flush=True)

    def embed(count: int) -> np.ndarray:
        # The same weights: an encoder is little more than its options.
        one = Encoder(
            encoder.backbone,
            encoder._tokenizer,
            encoder._method,
            max_length=work.max_length,
            streams=count,
        )
        return one.encode(texts, prompt=work.prompt, show_progress_bar=False)

    expected = embed(1)
    same = {count: bool((embed(count) == expected).all()) for count in counts}
    runs = {f"{count} streams": lambda count=count: embed(count) for count in counts}
    workers = start_processes(max(counts), texts, work, dtype)
    try:
        run_processes(workers)
        runs[f"{len(workers)} processes"] = lambda: run_processes(workers)
        seconds = interleaved(runs, args.rounds)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    rows = []
    for name, times in seconds.items():
        number, kind = name.split()
        is_streams = kind == "streams"
        rows.append(
            {
                "workload": workload,
                "dtype": dtype,
                "provider": name,
                "seconds": times,
                "texts": len(texts),
                "texts_per_second": len(texts) / statistics.median(times),
                "against_one_stream": median_ratio(seconds["1 streams"], times),
                "same_bits": same[int(number)] if is_streams else None,
                "chosen": is_streams and int(number) == chosen,
                "measured_gains": [c.gain for c in choices if c.count == int(number)]
                if is_streams
                else [],
            }
        )
        print(
            f"{workload:<10} {dtype} {name:<12} {rows[-1]['texts_per_second']:7.2f} texts/s "
            f"{rows[-1]['against_one_stream']:.2f}x" + (" chosen" if rows[-1]["chosen"] else ""),
            flush=True,
        )
    return rows


def start_processes(
    count: int, texts: list[str], work: workloads.Workload, dtype: str
) -> list[subprocess.Popen]:
    """Processes of one thread each, which have loaded the model, each with its share of texts."""
    by_length = sorted(texts, key=len)
    workers = []
    for index in range(count):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        options = {
            "model": MODEL,
            "dtype": dtype,
            "max_length": work.max_length,
            "prompt": work.prompt,
            "texts": by_length[index::count],
        }
        worker.stdin.write(json.dumps(options) + "\n")
        workers.append(worker)
    return workers


def run_processes(workers: list[subprocess.Popen]) -> None:
    """Let every process embed its texts; until the last is done."""
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    for worker in workers:
        if worker.stdout.readline() != "done\n":
            raise RuntimeError("a process has ended")


if __name__ == "__main__":
    main()
