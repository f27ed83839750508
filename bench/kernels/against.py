"""An op of this checkout against another checkout's, by this one's benchmark, in turns.

    python bench/kernels/against.py OTHER --op NAME [--select EXPRESSION] [--rounds N] [--json FILE]

OTHER: the folder of the other checkout. Both are built without compiled ops, which Triton's do not
need. --select: of the benchmark's cases, as pytest's -k. A ratio is of the medians over all rounds:
above 1 this checkout is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
NAMES = ("size", "case", "dtype", "mode", "provider")


def build(checkout: Path, target: Path) -> None:
    """The package of a checkout."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(target)]
    environment = {**os.environ, "GEN_FAST_BUILD": "none"}
    subprocess.run(command, cwd=checkout, env=environment, check=True)


def rows_of(package: Path, op: str, select: str, file: Path) -> list[dict]:
    """One run of the benchmark over a package."""
    # -P: python -m would put this checkout's folder first.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-o", "addopts=", "-k", select]
    command += ["--rows", str(file), f"bench/kernels/bench_{op}.py"]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return [json.loads(line) for line in file.read_text().splitlines()]


def main() -> None:
    """Print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("--op", required=True)
    parser.add_argument("--select", default="triton")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seconds: dict[tuple[str, ...], dict[str, list[float]]] = {}
    with TemporaryDirectory() as folder:
        packages = {"other": args.other.resolve(), "this": ROOT}
        for side, checkout in packages.items():
            packages[side] = Path(folder) / side
            build(checkout, packages[side])
        for turn in range(args.rounds):
            for side, package in packages.items():
                file = Path(folder) / f"{side}-{turn}.jsonl"
                for row in rows_of(package, args.op, args.select, file):
                    key = tuple(str(row[name]) for name in NAMES)
                    seconds.setdefault(key, {}).setdefault(side, []).append(row["p50"])
    report = []
    for key, sides in seconds.items():
        other, this = (statistics.median(sides[side]) for side in ("other", "this"))
        print(f"{' '.join(key)}: {1e6 * other:.0f} to {1e6 * this:.0f} us, {other / this:.2f}x")
        report.append({**dict(zip(NAMES, key, strict=True)), **sides, "ratio": other / this})
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
