"""This checkout against another one: seconds of encoding and of a training step, side by side.

    python bench/against.py OTHER_PYTHON [--processes N] [--rounds N] [--json FILE]

OTHER_PYTHON: the interpreter of an environment in which the other one is installed. A process may
be a fifth slower for minutes while another one of the same code is not. So each counts by its
fastest round; a side is several processes, in pairs, which take turns, and of which one or the
other starts first; and what is printed is the pairs' geometric mean with its standard error. An
environment with the same commit shows what differs without a reason.
"""

import math
import statistics
import subprocess
import sys
from collections.abc import Callable

from measure import arguments, machine, save

# Runs in either environment: what it imports has been in these places for long.
WORKER = """
import inspect, sys, time
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
for run in runs.values():
    run()
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    runs[line.strip()]()
    print(time.perf_counter() - start, flush=True)
"""
RUNS = ("encode", "query", "train")


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
    runs: tuple[str, ...] = RUNS,
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


def main() -> None:
    """Print a line a run."""
    parser = arguments(__doc__, rounds=12)
    parser.add_argument("other")
    parser.add_argument("--processes", type=int, default=6)
    args = parser.parse_args()
    commands = ([python, "-P", "-c", WORKER] for python in (sys.executable, args.other))
    rows = compare(*commands, args.processes, args.rounds)
    save(args.json, {**machine(), "rows": rows})


if __name__ == "__main__":
    main()
