"""This checkout against another one: seconds of encoding and of a training step, side by side.

    python bench/against.py OTHER_PYTHON [--processes N] [--rounds N] [--dtype bf16]
                            [--run documents queries ...] [--json FILE]

OTHER_PYTHON: the interpreter of an environment in which the other one is installed. Runs: a batch
of 14 texts, the same texts one by one, a training step of two; and, if asked for, two workloads of
encode.py with several batches each.

A process may be a fifth slower for minutes while another one of the same code is not. So each
counts by its fastest round; a side is several processes, in pairs, which take turns, and of which
one or the other starts first; and what is printed is the pairs' geometric mean with its standard
error. An environment with the same commit shows what differs without a reason.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import workloads
from measure import DTYPES, arguments, reported, save
from transformers import AutoTokenizer

from gen_fast.model.sources import resolve

# Runs in either environment: what it imports has been in these places for long.
WORKER = """
import inspect, json, sys, time
import numpy as np
import torch
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
settings = json.load(open(sys.argv[1]))
dtype = settings["dtype"]
encoder = gen_fast.load("smollm2-135m", device="cpu", dtype=dtype, max_length=1024)

source = names.resolve("smollm2-135m")
backbone = names.load_backbone(source, dtype=getattr(torch, dtype))
config = names.TrainConfig(answers=("-",), teacher="-", out="-", batch_size=2)
parts = backbone, names.load_head(source, backbone), 384, config
if names is not trainer:
    if "student" in inspect.signature(names.LLM2VecGenTask).parameters:
        parts = names.Student(*parts), config
    parts = [names.LLM2VecGenTask(*parts)]
stepper = trainer.Stepper(*parts)
ids = [rng.integers(1000, 20000, n) for n in (64, 96)]
examples = [Example(*ids, rng.standard_normal(384).astype(np.float32)) for _ in range(2)]

runs = {
    "encode": lambda: encoder.encode(texts, prompt_name="document", show_progress_bar=False),
    "query": lambda: [encoder.encode(text[:20], prompt_name="query") for text in texts],
    "train": lambda: stepper.step(examples),
}
for name, work in settings["workloads"].items():
    runs[name] = lambda work=work: encoder.encode(
        work["texts"], prompt=work["prompt"], show_progress_bar=False
    )
for name in settings["runs"]:
    runs[name]()
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    runs[line.strip()]()
    print(time.perf_counter() - start, flush=True)
"""
RUNS = ("encode", "query", "train")
WORKLOADS = ("documents", "queries")


def start(command: list[str]) -> subprocess.Popen:
    """A worker, when it is ready."""
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline().strip() == "ready"
    return worker


def seconds(worker: subprocess.Popen, run: str) -> float:
    """Of one run."""
    worker.stdin.write(f"{run}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def compare(
    this: list[str],
    other: list[str],
    processes: int,
    rounds: int,
    runs: Sequence[str],
    of_rounds: Callable[[list[float]], float] = min,
) -> list[dict]:
    """Rows of `runs`, printed: two commands that start workers, in `processes` pairs.

    of_rounds: what the seconds of a process are taken for.
    """
    sides = {"this": this, "other": other}
    pairs: dict[str, list[dict[str, float]]] = {run: [] for run in runs}
    for number in range(processes):
        names = sorted(sides, reverse=number % 2 == 1)
        workers = {side: start(sides[side]) for side in names}
        times = {(side, run): [] for side in sides for run in runs}
        for _ in range(rounds):
            names.reverse()
            for run in runs:
                for side in names:
                    times[side, run].append(seconds(workers[side], run))
        for worker in workers.values():
            worker.kill()
            worker.wait()
        for run in runs:
            pairs[run].append({side: of_rounds(times[side, run]) for side in sides})
    return [_row(run, of_run) for run, of_run in pairs.items()]


def _row(run: str, pairs: list[dict[str, float]]) -> dict:
    logs = [math.log(pair["other"] / pair["this"]) for pair in pairs]
    ratio = math.exp(statistics.mean(logs))
    error = ratio * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    this, other = (statistics.median(pair[side] for pair in pairs) for side in ("this", "other"))
    print(f"{run:<7} {this:.3f} s, the other {other:.3f} s: {ratio:.3f} ± {error:.3f} times")
    return {"run": run, "ratio": ratio, "standard_error": error, "pairs": pairs}


def settings(dtype: str, runs: Sequence[str]) -> dict:
    """What a worker is told: its dtype, what it will run, and the texts of WORKLOADS."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m"))
    works = [workloads.make(name, tokenizer, quick=True) for name in runs if name in WORKLOADS]
    of_name = {work.name: {"prompt": work.prompt, "texts": work.texts} for work in works}
    full_name = str(DTYPES[dtype]).removeprefix("torch.")
    return {"dtype": full_name, "runs": runs, "workloads": of_name}


def main() -> None:
    """Print a line a run."""
    parser = arguments(__doc__, rounds=12)
    parser.add_argument("other")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--run", nargs="+", choices=RUNS + WORKLOADS, default=RUNS)
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings(args.dtype, args.run), file)
        file.flush()
        pythons = (sys.executable, args.other)
        commands = ([python, "-P", "-c", WORKER, file.name] for python in pythons)
        rows = compare(*commands, args.processes, args.rounds, args.run)
    save(args.json, reported(rows))


if __name__ == "__main__":
    main()
