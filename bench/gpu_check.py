"""Everything that needs a GPU, in one command: `make gpu-check`.

    python bench/gpu_check.py [--out DIR] [--python PYTHON] [--dry-run]

Builds the package with its CUDA ops into build/gpu, then runs the tests marked gpu, the kernel
benchmarks, encoding and training at the sizes of Qwen3-0.6B and 8B, and writes one JSON and its
plots, named by GPU, date and commit. It needs no network: torch, Triton, transformers,
pytest-benchmark and pybind11 must be there. --dry-run does the same on the CPU with tiny sizes, to
check this script.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import machine

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build/gpu"
# Seconds that each step may take: nine minutes in all.
LIMITS = {"build": 90, "tests": 100, "kernels": 170, "encode": 100, "train": 75}


def run(step: str, command: list[str], environment: dict[str, str]) -> dict:
    """Run one step within its time, its output shown; what it left counts even if it failed."""
    print(f"\n=== {step}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMITS[step], check=False)
        code = done.returncode
    except subprocess.TimeoutExpired:
        code = -1
    seconds = round(time.perf_counter() - start, 1)
    print(f"=== {step}: exit {code} after {seconds} s", flush=True)
    return {"exit": code, "seconds": seconds, "command": " ".join(command)}


def read(path: Path) -> dict:
    """A step's JSON; empty if the step did not get so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    """Run the steps, write the report, print a short table last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        sys.exit("gpu-check: there is no CUDA GPU here; nothing was built, tested or measured")

    steps = {}
    environment = {**os.environ, "PYTHONPATH": str(BUILT), "PYTHONUNBUFFERED": "1"}
    python = sys.executable
    build = {**environment, "GEN_FAST_BUILD": "cpu" if args.dry_run else "cuda"}
    folders = ["--build-lib", str(BUILT), "--build-temp", str(ROOT / "build/gpu-temp")]
    steps["build"] = run("build", [python, "setup.py", "-q", "build", *folders], build)

    args.out.mkdir(parents=True, exist_ok=True)
    scratch = ROOT / "build/gpu-results"
    scratch.mkdir(parents=True, exist_ok=True)
    for old in scratch.glob("*.json"):
        old.unlink()
    marker = "not slow and not gpu" if args.dry_run else "gpu"
    what = ["tests/kernels/test_swiglu.py"] if args.dry_run else ["tests"]
    steps["tests"] = run(
        *("tests", [python, "-m", "pytest", "-q", "-m", marker, *what]), environment
    )
    chosen = ["-k", "swiglu"] if args.dry_run else []
    kernels = [python, "-m", "pytest", "-q", "bench/kernels", "-o", "addopts=", *chosen]
    kernels += ["--benchmark-json", str(scratch / "kernels.json"), "--benchmark-quiet"]
    steps["kernels"] = run("kernels", kernels, environment)
    shapes = ["--shape", "tiny"] if args.dry_run else []
    encode = [python, "bench/encode_shapes.py", "--json", str(scratch / "encode.json"), *shapes]
    steps["encode"] = run("encode", encode, environment)

    train = [python, "bench/train_shapes.py", "--json", str(scratch / "train.json"), *shapes]
    steps["train"] = run("train", train, environment)

    about = machine()
    rows = [b["extra_info"] for b in read(scratch / "kernels.json").get("benchmarks", [])]
    report = {
        "machine": about,
        "steps": steps,
        "kernels": rows,
        "encode": read(scratch / "encode.json").get("rows", []),
        "train": read(scratch / "train.json").get("rows", []),
    }
    gpu = re.sub(r"\W+", "-", str(about["gpu"])).strip("-").lower()
    stem = f"gpu_{gpu}_{about['date']}_{about['commit'].replace('-dirty', '')}"
    target = args.out / f"{stem}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    if rows:
        table = [python, "bench/kernels/table.py", str(scratch / "kernels.json")]
        subprocess.run([*table, "--plot", str(args.out / f"{stem}.png")], cwd=ROOT, check=False)
    for row in report["encode"]:
        print(
            f"{row['shape']} {row['workload']} {row['provider']}: {row['tokens_per_second']:.0f}"
            f" tokens/s, MFU {row['mfu']:.2f}, gen_fast {row['gen_fast_speedup']:.2f}x"
        )
    for row in report["train"]:
        print(
            f"{row['shape']} training {row['provider']}: {row['steps_per_second']:.2f} steps/s,"
            f" MFU {row['mfu']:.2f}, gen_fast {row['gen_fast_speedup']:.2f}x"
        )
    for name, step in steps.items():
        print(f"{name}: exit {step['exit']} in {step['seconds']} s")
    print(f"written to {target}")
    sys.exit(any(step["exit"] for step in steps.values()))


if __name__ == "__main__":
    main()
