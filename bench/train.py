"""Speed and memory of a training step against the reference package's.

    python bench/train.py [--quick] [--json FILE] [--plots DIR] [--dtype ...] [--case ...]

SmolLM2-135M, batch 8, 128 query and 192 answer tokens, of equal lengths or ragged around them. Both
sides start from the same weights and take the same batch, dtype and optimizer; the teacher's
vectors are given. They take turns, and ratios are medians over the rounds. Peak memory is that of
a process that loads its model and takes two steps.
"""

import argparse
import statistics
import subprocess
import sys

import measure
import numpy as np
import peers
import torch

from gen_fast.model.device import matmul_peak
from gen_fast.model.sources import resolve
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Example
from gen_fast.training.llm2vec_gen import LLM2VecGenTask
from gen_fast.training.student import Student
from gen_fast.training.trainer import Stepper

PROVIDERS = ("gen_fast", "llm2vec-gen", "llm2vec-gen, no checkpointing")
CASES = ("equal", "ragged")
BATCH, QUERY, ANSWER, DIMENSION = 8, 128, 192, 384


def main() -> None:
    """Measure and print; write the rows as JSON and the plot if asked."""
    parser = measure.arguments(
        __doc__, rounds=5, dtype=True, quick="two rounds, no memory", plots="the plot of cost"
    )
    parser.add_argument("--case", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--peak-memory-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory_of:
        print(_peak_memory(args))
        return
    rows = [
        row for case in args.case for dtype in args.dtype for row in _compare(args, case, dtype)
    ]
    report = measure.reported(rows)
    if args.plots:
        import plots

        report["scaling"] = _scaling(args)
        plots.train_scaling(report, args.plots)
    measure.save(args.json, report)


def make_batch(case: str, batch: int = BATCH, query: int = QUERY, answer: int = ANSWER) -> list:
    """Random ids; ragged lengths spread from a quarter to seven quarters of the mean."""
    rng = np.random.default_rng(0)
    spread = np.linspace(0.25, 1.75, batch) if case == "ragged" else np.ones(batch)
    orders = rng.permutation(batch), rng.permutation(batch)
    return [
        Example(
            query=rng.integers(1000, 40000, max(1, round(query * spread[orders[0][i]]))),
            answer=rng.integers(1000, 40000, max(1, round(answer * spread[orders[1][i]]))),
            vector=(rng.normal(size=DIMENSION) / DIMENSION**0.5).astype(np.float32),
        )
        for i in range(batch)
    ]


def _provider(name: str, dtype: torch.dtype):
    directory = resolve("smollm2-135m")
    config = TrainConfig(answers=("-",), teacher="-", out="-", warmup_steps=0)
    if name == "gen_fast":
        backbone = load_backbone(directory, dtype=dtype)
        head = load_head(directory, backbone)
        student = Student(backbone, head, DIMENSION, config)
        stepper = Stepper(LLM2VecGenTask(student, config))
        return stepper.step, stepper
    # The starting weights come from a student of ours over a backbone that is dropped again.
    backbone = load_backbone(directory, dtype=dtype)
    student = Student(backbone, backbone.embedding, DIMENSION, config)
    adapter = student.to_adapter(config)
    del backbone, student
    peer = peers.llm2vec_gen.ReferenceTraining(directory, adapter, dtype, "no check" not in name)
    return peer.step, peer


def _compare(args: argparse.Namespace, case: str, dtype_name: str) -> list[dict]:
    dtype, batch = measure.DTYPES[dtype_name], make_batch(case)
    rounds = 2 if args.quick else args.rounds
    made = {name: _provider(name, dtype) for name in PROVIDERS[:2]}
    for step, _ in made.values():
        step(batch)  # warm-up
    peaks: list[float] = []
    seconds = measure.interleaved(
        {name: lambda step=step: step(batch) for name, (step, _) in made.items()},
        rounds,
        lambda: peaks.append(matmul_peak(dtype)),
    )
    stepper = made["gen_fast"][1]
    peak = statistics.median(peaks)
    rows = []
    for name in PROVIDERS:
        row = {"case": case, "dtype": dtype_name, "provider": name, "batch": BATCH}
        row |= {"query_tokens": QUERY, "answer_tokens": ANSWER}
        if name in seconds:
            median = statistics.median(seconds[name])
            row["seconds"] = seconds[name]
            row["steps_per_second"] = 1 / median
            row["gen_fast_speedup"] = measure.median_ratio(seconds[name], seconds["gen_fast"])
        if name == "gen_fast":
            row["mfu"] = stepper.progress.flops / median / peak
            row["matmul_peak_gflops"] = peak / 1e9
        row["peak_memory_mb"] = None if args.quick else _measure_memory(name, case, dtype_name)
        rows.append(row)
    own = rows[0]["peak_memory_mb"]
    for row in rows:
        row["gen_fast_share_of_memory"] = own and own / row["peak_memory_mb"]
        _print_row(row)
    return rows


def _measure_memory(name: str, case: str, dtype: str) -> float:
    command = [sys.executable, __file__, "--peak-memory-of", name, "--case", case, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak_memory(args: argparse.Namespace) -> float:
    step, _ = _provider(args.peak_memory_of, measure.DTYPES[args.dtype[0]])
    batch = make_batch(args.case[0])
    for _ in range(2):
        step(batch)
    return measure.peak_memory_mb()


def _scaling(args: argparse.Namespace) -> list[dict]:
    """Seconds a step against query length, answer length and batch, one at a time."""
    dtype_name = args.dtype[-1]
    made = {name: _provider(name, measure.DTYPES[dtype_name])[0] for name in PROVIDERS[:2]}
    rows = []
    for axis, values in (
        ("query", (16, 128, 256)),
        ("answer", (32, 192, 384)),
        ("batch", (2, 8, 16)),
    ):
        for value in values:
            batch = make_batch("equal", **{axis: value})
            seconds = measure.interleaved(
                {name: lambda step=step, b=batch: step(b) for name, step in made.items()}, 1
            )
            rows += measure.points(seconds, axis=axis, value=value, dtype=dtype_name)
    return rows


def _print_row(row: dict) -> None:
    speed = f"{row['steps_per_second']:.3f} steps/s" if "seconds" in row else " " * 13
    ratio = f"gen_fast is {row['gen_fast_speedup']:.2f}x" if "seconds" in row else ""
    memory = row["peak_memory_mb"]
    print(
        f"{row['case']:<7} {row['dtype']} {row['provider']:<30} {speed} {ratio}"
        + (f" MFU {row['mfu']:.2f}" if "mfu" in row else "")
        + (f" {memory:.0f} MB, gen_fast {row['gen_fast_share_of_memory']:.0%}" if memory else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
