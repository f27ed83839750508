"""This checkout against another one: seconds of encoding and of a training step, side by side.

    python bench/against.py OTHER_PYTHON [--processes N] [--rounds N] [--json FILE]

OTHER_PYTHON: the interpreter of an environment in which the other one is installed. How memory lies
makes a process some percent faster or slower for as long as it lives, so a side is several
processes; they take turns, and a ratio is of the means over all of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from measure import machine

# Runs in either environment: what it imports has been in these places for long.
WORKER = """
import sys, time
import numpy as np
import gen_fast
from gen_fast.training import trainer
try:
    from gen_fast.training import llm2vec_gen as names
except ImportError:  # before the trainer took tasks
    names = trainer
from gen_fast.training.data import Example

rng = np.random.default_rng(0)
words = "a seal swims under the ice while birds look for fish near the shore".split()
texts = [" ".join(rng.choice(words, int(n))) for n in rng.integers(5, 120, size=14)]
encoder = gen_fast.load("smollm2-135m", device="cpu", dtype="float32")

source = names.resolve("smollm2-135m")
backbone = names.load_backbone(source)
config = names.TrainConfig(answers=("-",), teacher="-", out="-", batch_size=2)
parts = backbone, names.load_head(source, backbone), 384, config
stepper = trainer.Stepper(*parts if names is trainer else [names.LLM2VecGenTask(*parts)])
ids = [rng.integers(1000, 20000, n) for n in (64, 96)]
examples = [Example(*ids, rng.standard_normal(384).astype(np.float32)) for _ in range(2)]

runs = {
    "encode": lambda: encoder.encode(texts, prompt_name="document", show_progress_bar=False),
    "query": lambda: [encoder.encode(text[:20], prompt_name="query") for text in texts],
    "train": lambda: stepper.step(examples),
}
for run in runs.values():
    run()
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    runs[line.strip()]()
    print(time.perf_counter() - start, flush=True)
"""
RUNS = ("encode", "query", "train")


def start(python: str) -> subprocess.Popen:
    """A worker of one side, when it is ready."""
    worker = subprocess.Popen(
        [python, "-P", "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout.readline().strip() == "ready"
    return worker


def seconds(worker: subprocess.Popen, run: str) -> float:
    """Of one run."""
    worker.stdin.write(f"{run}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main() -> None:
    """Print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("other")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sides = {"this": sys.executable, "other": args.other}
    times = {(side, run): [] for side in sides for run in RUNS}
    for _ in range(args.processes):
        workers = {side: start(python) for side, python in sides.items()}
        for number in range(args.rounds):
            for run in RUNS:
                order = sides if number % 2 else reversed(sides)
                for side in order:
                    times[side, run].append(seconds(workers[side], run))
        for worker in workers.values():
            worker.kill()
    rows = []
    for run in RUNS:
        this, other = (statistics.mean(times[side, run]) for side in ("this", "other"))
        print(f"{run:<7} {this:.3f} s, the other {other:.3f} s: {other / this:.3f} times as fast")
        rows.append({"run": run, "this_s": this, "other_s": other, "ratio": other / this})
    if args.json:
        args.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
