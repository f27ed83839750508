"""A table and a plot of what `pytest bench/kernels --benchmark-json FILE` wrote, or gpu_check.py.

python bench/kernels/table.py FILE [--plot PNG]
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path


def main() -> None:
    """Print a line a case: the reference's time, and each provider's speed relative to it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rows", type=Path, help="of a benchmark's file, the rows alone")
    args = parser.parse_args()
    report = json.loads(args.file.read_text())
    if "benchmarks" in report:
        rows = [b["extra_info"] for b in report["benchmarks"]]
    else:
        rows = report["kernels"]
    if args.rows:
        machine = report["machine_info"]
        made = {"cpu": machine["cpu"].get("brand_raw", "unknown")}
        made |= {name: machine.get(name) for name in ("torch", "threads")}
        made |= {"commit": report["commit_info"]["id"], "date": report["datetime"]}
        args.rows.write_text(json.dumps({**made, "rows": rows}, indent=1) + "\n")
    cases = defaultdict(dict)
    for row in rows:
        if "p50" not in row:  # it was interrupted, or its check failed
            continue
        key = tuple(row[name] for name in ("op", "size", "case", "dtype", "mode"))
        cases[key][row["provider"]] = row
    for key, providers in cases.items():
        # The eager baseline: plain torch, and for attention torch's own flash kernel.
        plain = ("sdpa", "flash-attention", "reference")
        base = next((providers[name] for name in plain if name in providers), None)
        base = base or next(iter(providers.values()))
        speeds = [
            f"{name} {base['p50'] / row['p50']:.2f}x ({row['roofline_share']:.0%} of roofline)"
            for name, row in providers.items()
            if row is not base
        ]
        print(
            f"{' '.join(filter(None, key))}: {base['provider']} {1e3 * base['p50']:.3f} ms"
            f" ({base['roofline_share']:.0%}); {', '.join(speeds)}"
        )
    if args.plot and cases:
        plot(cases, args.plot)


def plot(cases: dict, target: Path) -> None:
    """Share of the roofline by case and provider."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    providers = sorted({name for rows in cases.values() for name in rows})
    figure, axis = plt.subplots(figsize=(9, 0.32 * len(cases) + 1.5))
    height = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        ys = [y for y, rows in enumerate(cases.values()) if provider in rows]
        xs = [rows[provider]["roofline_share"] for rows in cases.values() if provider in rows]
        axis.barh([y + i * height for y in ys], xs, height, label=provider)
    axis.set_yticks([y + 0.4 for y in range(len(cases))])
    axis.set_yticklabels([" ".join(filter(None, key)) for key in cases], fontsize=7)
    axis.set_xlabel("share of the roofline (copy bandwidth or matmul peak of this machine)")
    axis.invert_yaxis()
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
