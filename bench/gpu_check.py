"""Everything that needs a GPU, in one command: `make gpu-check`.

    python bench/gpu_check.py [--steps build smoke encode …] [--seconds N] [--out DIR] [--dry-run]

Builds the package with its CUDA ops, then goes from what says most to what takes longest: a quick
check that bf16 is right, encoding with a profile of where its time goes, attention at 256 to 276
tokens, the row ops, distill, training, all tests marked gpu, and last what torch.compile and the
CUDA ops reach. Sizes are those of Qwen3-0.6B and 8B. One JSON and its plot say what came of it,
named by GPU, date and commit ($GEN_FAST_COMMIT where there is no repository).

Everything that is written, the build, caches and logs too, lies below one folder: DIR, or $OUT, or
build/gpu-check. Steps may be spread over calls: each keeps its rows and its log there, and every
report holds what all of them left. The steps of a call share --seconds (nine minutes); one whose
time is up is interrupted, and what it had measured counts. Each op has a process of its own: an
illegal memory access spoils all that follows in its process.

It needs no network: torch, Triton, transformers, gguf, pytest-benchmark, pytest-xdist, pybind11
and a C++ compiler must be there. pytest-timeout is used if it is. --dry-run does the same on the
CPU with tiny sizes and without compiled ops, to check this script.
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

sys.dont_write_bytecode = True  # of measure.py, beside it

import torch  # noqa: E402
from measure import machine  # noqa: E402

ROOT = Path(__file__).parents[1]
ROW_OPS = ("norm", "rope", "swiglu", "append", "lora_down", "dropout", "pool", "qlinear")
# What of a call's time each step may take: its share of what the steps before it left.
SHARES = {
    "build": 90,
    "smoke": 40,
    "encode": 110,
    "attention": 60,
    **dict.fromkeys(ROW_OPS, 25),
    "qlinear": 75,  # products too, at four numbers of rows
    "distill": 30,
    "train": 80,
    "tests": 200,
    "compile": 60,
    "cuda": 40,
}
PROFILE_SECONDS = 1  # reading a profile takes far longer than recording it
GRACE = 15  # seconds to write what there is, after an interrupt


class Folder:
    """Where everything of a run goes: reports in `out`, what they are made of in out/work."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.work = out / "work"
        self.built = self.work / "build"
        self.logs = out / "logs"
        self.results = out / "results"
        self.temporary = self.work / "tmp"
        for folder in (self.logs, self.results, self.temporary):
            folder.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """This process' own, with the build first and every cache in the folder."""
        caches = {
            "TRITON_CACHE_DIR": "triton",
            "TORCHINDUCTOR_CACHE_DIR": "inductor",
            "CUDA_CACHE_PATH": "cuda",
            "XDG_CACHE_HOME": "xdg",
            "GEN_FAST_CACHE": "gen_fast",
            "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis",
            "MPLCONFIGDIR": "matplotlib",
        }
        path = os.pathsep.join(filter(None, (str(self.built), os.environ.get("PYTHONPATH"))))
        return {
            **os.environ,
            **{name: str(self.work / cache) for name, cache in caches.items()},
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def run(
    name: str,
    command: list[str],
    folder: Folder,
    environment: dict[str, str],
    limit: float,
    where: Path = ROOT,
) -> dict:
    """Run a command, its output shown and logged; when time is up interrupt it, then kill."""
    print(f"\n=== {name}, at most {limit:.0f} s: {' '.join(command)}", flush=True)
    # A session of its own, so that the interrupt reaches every process of the command.
    process = subprocess.Popen(
        command, cwd=where, env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    log = folder.logs / f"{name}.log"
    showing = Thread(target=show, args=(process, log), daemon=True)
    showing.start()
    start = time.perf_counter()
    try:
        in_time = wait(process, start + limit)
        showing.join(GRACE)
    finally:  # nothing of it outlives the step, nor this script if that is stopped
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    lines = log.read_text(errors="replace").split("\n")
    result = {
        "exit": process.returncode,
        "in_time": in_time,
        "seconds": round(time.perf_counter() - start, 1),
        "command": " ".join(command),
        "last_line": next((line for line in reversed(lines) if line.strip()), ""),
    }
    print(f"=== {name}: {outcome(result)}", flush=True)
    return result


def wait(process: subprocess.Popen, until: float) -> bool:
    """Wait; interrupt when time is up, then kill what is left. False if time was up."""
    in_time = True
    try:
        process.wait(max(0.0, until - time.perf_counter()))
    except subprocess.TimeoutExpired:
        in_time = False
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return in_time


def show(process: subprocess.Popen, log: Path) -> None:
    """Copy a command's output to the terminal and to its log as it comes."""
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


def build(folder: Folder, environment: dict[str, str], dry: bool, limit: float) -> dict:
    """Build, without the compiled ops if they cannot be built: Triton needs none.

    From links to the sources, without pyproject.toml: setuptools below 77 refuses its licence.
    """
    source = folder.work / "source"
    for old in (source, folder.built):
        shutil.rmtree(old, ignore_errors=True)
    source.mkdir(parents=True)
    for name in ("setup.py", "gen_fast", "kernels", "training", "csrc"):
        (source / name).symlink_to(ROOT / name)
    pure = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder.built)]
    compiled = ["build_ext", "--build-lib", str(folder.built), "--parallel", "2"]
    compiled += ["--build-temp", str(folder.work / "objects")]
    kind = "none" if dry else "cuda"
    environment = {**environment, "GEN_FAST_BUILD": kind}
    command = pure if dry else [*pure, *compiled]
    result = {
        "compiled": kind,
        **run("build", command, folder, environment, limit, source),
    }
    if result["exit"] and not dry:
        print(f"=== the {kind} ops could not be built, see above: going on without", flush=True)
        result["compiled"] = "nothing: it failed"
        shutil.rmtree(folder.built, ignore_errors=True)
        environment["GEN_FAST_BUILD"] = "none"
        subprocess.run(pure, cwd=source, env=environment, check=True)
    return result


def refuse_other_packages(folder: Folder, environment: dict[str, str]) -> None:
    """Exit unless the steps will import what was built, not the sources or an installed package."""
    script = "import importlib.util as u; spec = u.find_spec('gen_fast'); print(spec.origin)"
    where = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    if not where.startswith(f"{folder.built}{os.sep}"):
        origin = where or "nowhere"
        sys.exit(f"gpu-check: gen_fast comes from {origin}, not {folder.built}: run the build")


def commands(step: str, folder: Folder, dry: bool) -> dict[str, list[str]]:
    """What a step runs, by name; the build has a function of its own."""
    # -P: python -m would put this folder first, whose gen_fast is not the one that was built.
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "--tb=short"]
    pytest += ["-o", f"cache_dir={folder.work / 'pytest'}"]
    pytest += ["--timeout=120"] if importlib.util.find_spec("pytest_timeout") else []
    marked = [*pytest, "-m", "not slow and not gpu" if dry else "gpu"]
    rows = ["--rows", str(folder.results / f"{step}.jsonl")]
    bench = [*pytest, "-o", "addopts=", "--benchmark-quiet", *rows]
    bench += ["--benchmark-storage", f"file://{folder.work / 'benchmarks'}"]
    bench += ["--benchmark-disable"] if dry else []
    # What is measured last is left out before: torch.compile takes seconds a case to compile.
    ours = "reference and bf16 and not backward" if dry else "not compile and not cuda"
    if step == "smoke":
        chosen = "tests/kernels/test_swiglu.py" if dry else "tests/ops/test_gpu.py"
        return {step: [*marked, "-k", "nan" if dry else "half_precision or fits_a_cuda", chosen]}
    if step in ("encode", "train"):
        tiny = ["--shape", "tiny", "--rounds", "1"] if dry else []
        script = [sys.executable, f"bench/{step}_shapes.py", *tiny]
        seconds = "0.1" if dry else str(PROFILE_SECONDS)
        return {
            step: [*script, "--profile", seconds, "--json", str(folder.results / f"{step}.json")]
        }
    if step == "attention":
        case = "short and not behind" if dry else "256-276"
        return {step: [*bench, "-k", f"{case} and {ours}", "bench/kernels/bench_attention.py"]}
    if step == "distill" and dry:  # its smallest case takes minutes on a CPU
        return {step: [*bench, "--collect-only", "bench/kernels/bench_distill.py"]}
    if step in (*ROW_OPS, "distill"):
        return {step: [*bench, "-k", ours, f"bench/kernels/bench_{step}.py"]}
    if step == "tests":
        files = [
            path
            for path in sorted((ROOT / "tests").rglob("test_*.py"))
            if path.parent.name == "kernels" or "mark.gpu" in path.read_text()
        ]
        files = [ROOT / "tests/kernels/test_swiglu.py"] if dry else files
        # Most of their time is Triton compiling, one kernel a process.
        spread = ["--numprocesses", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
        # Of test_gpu_check, which runs this script, nothing is marked gpu.
        names = [str(path.relative_to(ROOT)) for path in files if path.stem != "test_gpu_check"]
        return {step: [*marked, *spread, *names]}
    # torch.compile and the CUDA ops, of each op; attention's other cases too.
    kind = ours if dry else {"compile": "compile", "cuda": "cuda"}[step]
    benches = sorted((ROOT / "bench/kernels").glob("bench_*.py"))
    benches = [ROOT / "bench/kernels/bench_swiglu.py"] if dry else benches
    return {
        f"{step}-{path.stem}": [*bench, "-k", kind, str(path.relative_to(ROOT))] for path in benches
    }


def write_report(steps: dict[str, dict], about: dict, folder: Folder) -> tuple[Path, dict]:
    """One JSON with what all steps left until now."""
    report = {
        "machine": about,
        "steps": steps,
        "kernels": [
            row for file in sorted(folder.results.glob("*.jsonl")) for row in read_lines(file)
        ],
        **{s: read(folder.results / f"{s}.json").get("rows", []) for s in ("encode", "train")},
    }
    gpu = re.sub(r"\W+", "-", str(about["gpu"])).strip("-").lower()
    stem = f"gpu_{gpu}_{about['date']}_{about['commit'].replace('-dirty', '')}".rstrip("_")
    target = folder.out / f"{stem}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    return target, report


def main() -> None:
    """Run the steps, write the report after each, print a short table last."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--seconds", type=float, default=540, help="for the steps of this call")
    out = Path(os.environ.get("OUT") or ROOT / "build/gpu-check")
    parser.add_argument("--out", type=Path, default=out, help="the folder of all that is written")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        sys.exit("gpu-check: there is no CUDA GPU here; nothing was built, tested or measured")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu-check: stopped"))
    end = time.perf_counter() + args.seconds
    about = machine()
    folder = Folder(args.out.resolve())
    environment = folder.environment()
    chosen = [step for step in SHARES if step in args.steps]
    steps = read(folder.results / "steps.json")
    ran: list[str] = []
    for i, step in enumerate(chosen):
        share = SHARES[step] / sum(SHARES[later] for later in chosen[i:])
        limit = share * (end - time.perf_counter()) - GRACE
        for old in folder.results.glob(f"{step}.*"):
            old.unlink()
        if step == "build":
            results = {step: build(folder, environment, args.dry_run, limit)}
        else:
            refuse_other_packages(folder, environment)
            every = commands(step, folder, args.dry_run)
            results = {}
            for name, command in every.items():
                results[name] = run(name, command, folder, environment, limit / len(every))
        steps |= results
        ran += results
        (folder.results / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")
        target, report = write_report(steps, about, folder)

    if report["kernels"]:
        table = [sys.executable, "bench/kernels/table.py", str(target)]
        plot = ["--plot", str(target.with_suffix(".png"))]
        subprocess.run([*table, *plot], cwd=ROOT, env=environment, check=False)
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
        earlier = "" if step in ran else " (an earlier call)"
        print(f"{step}: {outcome(result)}{earlier}; {result['last_line']}")
    if steps.get("build", {}).get("exit"):
        print("the compiled ops are missing: only Triton's and torch's were tested and measured")
    print(f"written to {target}")
    sys.exit(any(steps[step]["exit"] for step in ran))


if __name__ == "__main__":
    main()
