"""A table and a plot of what `pytest bench/kernels --benchmark-json FILE` wrote, or gpu_check.py.

FILE may also be what --rows has written.

python bench/kernels/table.py FILE [--plot PNG]
"""

import argparse
import json
import statistics
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
        rows = report["kernels"] if "kernels" in report else report["rows"]
    if args.rows:
        machine = report["machine_info"]
        header = {"cpu": machine["cpu"].get("brand_raw", "unknown")}
        header |= {name: machine.get(name) for name in ("torch", "threads")}
        header |= {"commit": report["commit_info"]["id"], "date": report["datetime"]}
        args.rows.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
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


OURS = {
    "cpu": "gen_fast, C++",
    "cpu-training": "gen_fast, C++, memory as in training",
    "triton": "gen_fast, Triton",
    "cuda": "gen_fast, CUDA",
}
PEERS = {
    "reference": "PyTorch, eager",
    "torch.compile": "PyTorch, torch.compile",
    "sdpa": "PyTorch, flash attention for CPUs",
    "flash-attention": "FlashAttention 2",
    "varlen": "FlashAttention 2, torch.nn.attention.varlen",
    "varlen-fa3": "FlashAttention 3",
    "flex-attention": "FlexAttention",
    "liger": "Liger-Kernel",
    "cut-cross-entropy": "Cut Cross-Entropy",
}


def plot(cases: dict, target: Path) -> None:
    """Share of the roofline by case and provider, with what it comes to as the title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {**OURS, **PEERS}
    measured = {name for rows in cases.values() for name in rows}
    providers = [name for name in names if name in measured]
    figure, axis = plt.subplots(figsize=(9, 0.08 * len(providers) * len(cases) + 1.5))
    height = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        ys = [y for y, rows in enumerate(cases.values()) if provider in rows]
        xs = [100 * rows[provider]["roofline_share"] for rows in cases.values() if provider in rows]
        label = names[provider]
        axis.barh([y + i * height for y in ys], xs, height, label=label)
    axis.set_yticks([y + 0.4 for y in range(len(cases))])
    axis.set_yticklabels([" ".join(filter(None, key)) for key in cases], fontsize=7)
    axis.set_ylabel("op, model, case, dtype, mode")
    axis.set_xlabel("% of the roofline: this machine's memory bandwidth or matmul peak")
    axis.set_xlim(left=0)
    axis.axvline(100, color="black", linewidth=0.8)
    axis.set_ylim(len(cases), -0.5)
    axis.legend(fontsize=7)
    ours, peers = (
        statistics.median(
            max(100 * rows[name]["roofline_share"] for name in group if name in rows)
            for rows in cases.values()
            if any(name in rows for name in group)
        )
        for group in (OURS, PEERS)
    )
    axis.set_title(
        f"Median over the cases: gen_fast reaches {ours:.0f}% of the roofline,"
        f" the best peer {peers:.0f}%",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
