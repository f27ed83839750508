"""Everything that needs a GPU, in one command: `make gpu-check`.

    python bench/gpu_check.py [--steps build tests kernels encode train] [--seconds N] [--out DIR]
                              [--dry-run]

Builds the package with its CUDA ops into build/gpu, then runs the tests marked gpu, the kernel
benchmarks, encoding and training at the sizes of Qwen3-0.6B and 8B, and writes one JSON and its
plot, named by GPU, date and commit ($GEN_FAST_COMMIT where there is no repository). Steps may be
spread over calls: each keeps its rows and its log in build/gpu-results, and every report holds what
all of them left. The steps of a call share --seconds (nine minutes); one whose time is up is
interrupted, and what it had measured counts.

It needs no network: torch, Triton, transformers, pytest-benchmark, pybind11 and a C++ compiler must
be there. pytest-xdist and pytest-timeout are used if they are. --dry-run does the same on the CPU
with tiny sizes, to check this script.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import torch
from measure import machine

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build/gpu"
SCRATCH = ROOT / "build/gpu-results"
# What of a call's time each step may take: its share of what the steps before it left.
SHARES = {"build": 90, "tests": 110, "kernels": 160, "encode": 100, "train": 80}
TEST_PROCESSES = 12
GRACE = 15  # seconds to write what there is, after an interrupt


def run(
    step: str, command: list[str], environment: dict[str, str], limit: float, folder: Path = ROOT
) -> dict:
    """Run one step, its output shown and logged; when time is up interrupt it, then kill it."""
    print(f"\n=== {step}, at most {limit:.0f} s: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    # A session of its own, so that the interrupt reaches every process that the step started.
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    showing = Thread(target=show, args=(process, SCRATCH / f"{step}.log"), daemon=True)
    showing.start()
    in_time = True
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        in_time = False
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:  # nothing of it outlives the step, nor this script if that is stopped
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    showing.join(GRACE)
    seconds = round(time.perf_counter() - start, 1)
    log = (SCRATCH / f"{step}.log").read_text(errors="replace").split("\n")
    result = {
        "exit": process.returncode,
        "in_time": in_time,
        "seconds": seconds,
        "command": " ".join(command),
        "last_line": next((line for line in reversed(log) if line.strip()), ""),
    }
    print(f"=== {step}: {outcome(result)}", flush=True)
    return result


def show(process: subprocess.Popen, log: Path) -> None:
    """Copy a step's output to the terminal and to its log as it comes."""
    with log.open("wb") as file:
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            file.write(chunk)
            file.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()


def outcome(result: dict) -> str:
    """How a step ended, in words."""
    late = "" if result["in_time"] else ", its time was up"
    return f"exit {result['exit']} after {result['seconds']} s{late}"


def read(path: Path) -> dict:
    """A step's JSON; empty if it is missing or cut."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; none if it is missing, without a last one that is cut."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def build(environment: dict[str, str], dry: bool, limit: float) -> dict:
    """Build into build/gpu, without the compiled ops if they cannot be built: Triton needs none.

    From links to the sources, without pyproject.toml: setuptools below 77 refuses its licence.
    """
    source = ROOT / "build/gpu-source"
    for old in (source, BUILT):
        shutil.rmtree(old, ignore_errors=True)
    source.mkdir(parents=True)
    for name in ("setup.py", "gen_fast", "kernels", "training", "csrc"):
        (source / name).symlink_to(ROOT / name)
    pure = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(BUILT)]
    compiled = ["build_ext", "--build-lib", str(BUILT), "--parallel", "2"]
    compiled += ["--build-temp", str(ROOT / "build/gpu-temp")]
    wanted = "cpu" if dry else "cuda"
    environment = {**environment, "GEN_FAST_BUILD": wanted}
    result = {"compiled": wanted}
    result |= run("build", [*pure, *compiled], environment, limit, source)
    if result["exit"]:
        print(f"=== the {wanted} ops could not be built, see above: going on without", flush=True)
        result["compiled"] = "nothing: it failed"
        shutil.rmtree(BUILT, ignore_errors=True)
        environment["GEN_FAST_BUILD"] = "none"
        subprocess.run(pure, cwd=source, env=environment, check=True)
    return result


def refuse_other_packages(environment: dict[str, str]) -> None:
    """Exit unless the steps will import what was built, not the sources or an installed package."""
    script = "import importlib.util as u; found = u.find_spec('gen_fast'); print(found.origin)"
    where = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    if not where.startswith(f"{BUILT}{os.sep}"):
        sys.exit(f"gpu-check: gen_fast comes from {where or 'nowhere'}, not {BUILT}: run the build")


def there(module: str) -> bool:
    """Whether a plugin of pytest is installed."""
    return importlib.util.find_spec(module) is not None


def commands(dry: bool) -> dict[str, list[str]]:
    """Each step's command, but for the build."""
    # -P: python -m would put this folder first, whose gen_fast is not the one that was built.
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short"]
    pytest += ["--timeout=120"] if there("pytest_timeout") else []
    marker, shapes = "gpu", []
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if path.parent.name == "kernels" or "mark.gpu" in path.read_text()
    ]
    kernels = ["bench/kernels", "-o", "addopts=", "--benchmark-quiet"]
    if dry:
        marker, files = "not slow and not gpu", ["tests/kernels/test_swiglu.py"]
        kernels += ["-k", "swiglu"]
        shapes = ["--shape", "tiny"]
    processes = ["-n", "2" if dry else str(TEST_PROCESSES)] if there("xdist") else []
    return {
        "tests": [*pytest, "-m", marker, *processes, *files],
        "kernels": [*pytest, *kernels, "--rows", str(SCRATCH / "kernels.jsonl")],
        **{
            step: [
                *(sys.executable, f"bench/{step}_shapes.py", *shapes),
                *("--json", str(SCRATCH / f"{step}.json")),
            ]
            for step in ("encode", "train")
        },
    }


def write_report(steps: dict[str, dict], about: dict, out: Path) -> tuple[Path, dict]:
    """One JSON with what all steps left until now."""
    report = {
        "machine": about,
        "steps": steps,
        "kernels": read_lines(SCRATCH / "kernels.jsonl"),
        **{step: read(SCRATCH / f"{step}.json").get("rows", []) for step in ("encode", "train")},
    }
    gpu = re.sub(r"\W+", "-", str(about["gpu"])).strip("-").lower()
    stem = f"gpu_{gpu}_{about['date']}_{about['commit'].replace('-dirty', '')}".rstrip("_")
    target = out / f"{stem}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    return target, report


def main() -> None:
    """Run the steps, write the report after each, print a short table last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=540, help="for the steps of this call")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        sys.exit("gpu-check: there is no CUDA GPU here; nothing was built, tested or measured")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu-check: stopped"))
    end = time.perf_counter() + args.seconds
    about = machine()
    args.out.mkdir(parents=True, exist_ok=True)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(BUILT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    chosen = [step for step in SHARES if step in args.steps]
    steps = read(SCRATCH / "steps.json")
    for i, step in enumerate(chosen):
        share = SHARES[step] / sum(SHARES[later] for later in chosen[i:])
        limit = share * (end - time.perf_counter()) - GRACE
        for old in SCRATCH.glob(f"{step}.*"):
            old.unlink()
        if step == "build":
            steps[step] = build(environment, args.dry_run, limit)
        else:
            refuse_other_packages(environment)
            # The tests' processes have a core each.
            own = {"OMP_NUM_THREADS": "1"} if step == "tests" else {}
            command = commands(args.dry_run)[step]
            steps[step] = run(step, command, {**environment, **own}, limit)
        (SCRATCH / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")
        target, report = write_report(steps, about, args.out)

    if report["kernels"]:
        table = [sys.executable, "bench/kernels/table.py", str(target)]
        subprocess.run([*table, "--plot", str(target.with_suffix(".png"))], cwd=ROOT, check=False)
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
    for step, result in steps.items():
        earlier = "" if step in chosen else " (an earlier call)"
        print(f"{step}: {outcome(result)}{earlier}; {result['last_line']}")
    if steps.get("build", {}).get("exit"):
        print("the compiled ops are missing: only Triton's and torch's were tested and measured")
    print(f"written to {target}")
    sys.exit(any(steps[step]["exit"] for step in chosen))


if __name__ == "__main__":
    main()
