"""Plots of benchmark rows.

    python bench/plots.py ENCODE.json RETRIEVAL.json --out FILE.png

Draws speed against retrieval quality from what encode.py and retrieval.py wrote.
"""

import argparse
import json
from pathlib import Path

ADAPTER = "adapter, query prompt 'query'"
# What each provider of encode.py embeds by, as retrieval.py names it; and the label's place.
EMBEDS_BY = {
    "gen_fast": (ADAPTER, "gen_fast, adapter", (0, 12), "center"),
    "llm2vec-gen": (ADAPTER, "llm2vec-gen, same adapter", (-8, -4), "right"),
    "transformers": (ADAPTER, "transformers, same adapter", (8, -4), "left"),
    "sentence-transformers": ("mean", "sentence-transformers,\nmean pooling", (9, -12), "left"),
}
UNTIMED = {
    "teacher": "teacher (MiniLM, trained with supervision)",
    "echo": "echo",
    "weighted-mean": "weighted-mean",
    "last-token": "last-token",
}


def main() -> None:
    """Draw speed against quality."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("encode", type=Path)
    parser.add_argument("retrieval", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    encode, retrieval = (json.loads(path.read_text()) for path in (args.encode, args.retrieval))
    speed_and_quality(encode, retrieval, args.dtype, args.out)


def speed_and_quality(encode: dict, retrieval: dict, dtype: str, file: Path) -> None:
    """Texts a second against mean nDCG@10; methods whose speed was not measured are lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores: dict[str, list[float]] = {}
    for row in retrieval["rows"]:
        scores.setdefault(row["method"], []).append(max(row["ndcg"], row["ndcg_centred"]))
    quality = {method: sum(values) / len(values) for method, values in scores.items()}
    speeds = {
        row["provider"]: row["docs_per_second"] for row in encode["rows"] if row["dtype"] == dtype
    }
    figure, axis = plt.subplots(figsize=(8, 4.6))
    right = 1.25 * max(speeds.values())
    for method, label in UNTIMED.items():
        axis.axhline(quality[method], color="0.6", linestyle=":", linewidth=1)
        axis.annotate(
            label,
            (right, quality[method]),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.35",
        )
    for provider, (method, label, offset, side) in EMBEDS_BY.items():
        own = provider == "gen_fast"
        axis.plot(
            speeds[provider],
            quality[method],
            "*" if own else "o",
            color="tab:red" if own else "tab:blue",
            markersize=15 if own else 7,
        )
        axis.annotate(
            label,
            (speeds[provider], quality[method]),
            xytext=offset,
            textcoords="offset points",
            ha=side,
            fontsize=9,
        )
    machine = encode["machine"]
    axis.set(
        title="The same adapter, run faster",
        xlabel=f"texts/s, short queries, {dtype}, {machine['threads']} {machine['cpu']} threads",
        ylabel="nDCG@10, mean of 3 retrieval tasks",
        xlim=(0, right),
        ylim=(0, 0.72),
    )
    axis.grid(alpha=0.2)
    commits = ", ".join(sorted({row["commit"] for row in retrieval["rows"]}))
    note = (
        "SmolLM2-135M. Dotted: quality of methods whose speed was not measured here. "
        f"Commits {machine['commit']} (speed); {commits} (quality)."
    )
    figure.text(0.01, 0.01, note, fontsize=7, color="0.35")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def encode_scaling(report: dict, folder: Path) -> None:
    """Cost a text against its length and against how many are encoded at once."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    labels = {"length": ("length", "tokens a text"), "texts": ("texts", "texts a call, 24 tokens")}
    for panel, (axis, (key, label)) in zip(axes, labels.items(), strict=True):
        points = [p for p in report["scaling"] if p["axis"] == axis]
        for provider, dtype in sorted({(p["provider"], p["dtype"]) for p in points}):
            line = [p for p in points if (p["provider"], p["dtype"]) == (provider, dtype)]
            panel.plot(
                [p[key] for p in line],
                [p["ms_per_text"] for p in line],
                "o-" if provider == "gen_fast" else "s--",
                label=f"{provider} {dtype}",
            )
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="ms a text")
        panel.grid(alpha=0.3)
    axes[0].legend()
    machine = report["machine"]
    figure.suptitle(
        f"SmolLM2-135M, {machine['cpu']}, {machine['threads']} threads, {machine['commit']}"
    )
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "encode_scaling.png", dpi=120)


def train_scaling(report: dict, folder: Path) -> None:
    """Seconds a training step against query length, answer length and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {"query": "query tokens", "answer": "answer tokens", "batch": "texts a step"}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True)
    for panel, (axis, label) in zip(axes, labels.items(), strict=True):
        points = [p for p in report["scaling"] if p["axis"] == axis]
        for provider in dict.fromkeys(p["provider"] for p in points):
            line = [p for p in points if p["provider"] == provider]
            panel.plot(
                [p["value"] for p in line],
                [p["seconds"] for p in line],
                "o-" if provider == "gen_fast" else "s--",
                label=f"{provider} {line[0]['dtype']}",
            )
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    slowest = max(point["seconds"] for point in report["scaling"])
    axes[0].set(ylabel="seconds a step", ylim=(0, 1.05 * slowest))
    axes[0].legend()
    machine = report["machine"]
    figure.suptitle(
        "SmolLM2-135M, batch 8, 128 query and 192 answer tokens unless varied; "
        f"{machine['cpu']}, {machine['threads']} threads, {machine['commit']}",
        fontsize=10,
    )
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "train_scaling.png", dpi=120)


if __name__ == "__main__":
    main()
