"""Plots of benchmark rows, drawn by the scripts that measure them."""

from pathlib import Path


def mean_score(rows: list[dict]) -> tuple[float, float]:
    """Mean over tasks, whose errors are independent, and its standard error."""
    mean = sum(row["score"] for row in rows) / len(rows)
    error = sum(row["standard_error"] ** 2 for row in rows) ** 0.5 / len(rows)
    return mean, error


def speed_and_quality(report: dict, file: Path) -> None:
    """Texts a second against the mean score of the local tasks, from evaluate.py's report."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.8))
    for name, speed in report["texts_per_second"].items():
        rows = [row for row in report["rows"] if row["method"] == name]
        # The reference package computes what the adapter does: only its speed is its own.
        own = bool(rows)
        if not own:
            rows = [r for r in report["rows"] if r["method"].startswith(name.split()[0])]
        mean, error = mean_score(rows)
        axis.errorbar(
            speed,
            mean,
            yerr=error,
            fmt="o" if own else "s",
            color="tab:blue" if own else "0.5",
            capsize=3,
        )
        # Beside the point, on the side where there is room.
        left = not own or speed == max(report["texts_per_second"].values())
        axis.annotate(
            name,
            (speed, mean),
            xytext=(-8 if left else 8, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
        )
    machine = report["machine"]
    tasks = len({row["task"] for row in report["rows"]})
    axis.set(
        xscale="log",
        xlabel=f"texts/s, short questions, {report['dtype']}, {machine['threads']} threads of "
        f"{machine['cpu']}",
        ylabel=f"mean score of {tasks} tasks, ± standard error",
    )
    axis.margins(x=0.15, y=0.15)
    axis.grid(alpha=0.2)
    figure.text(0.01, 0.01, f"SmolLM2-135M; commit {machine['commit']}", fontsize=7, color="0.35")
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


def quantized(quality: dict, speeds: list[dict], file: Path) -> None:
    """Speed on documents against what quantising loses, and what each layer loses by itself.

    quality, speeds: reports of quantized_quality.py and of quantized.py, of one machine.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    documents = {
        (row["dtype"], row["provider"]): row["texts_per_second"]
        for speed in speeds
        for row in speed["rows"]
        if row["workload"] == "documents"
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    for method, marker in (("adapter", "o"), ("mean", "s")):
        rows = [row for row in quality["rows"] if row["method"] == method]
        modes = {("fp32", None): 1.0} | {
            (row["dtype"], row["quantize"]): row["centred_cosine_mean"]
            for row in rows
            if row["part"] == "all"
        }
        xs = [documents[dtype, kind or dtype] for dtype, kind in modes]
        left.scatter(xs, list(modes.values()), marker=marker, label=method)
        for x, ((dtype, kind), cosine) in zip(xs, modes.items(), strict=True):
            if method == "adapter":
                name = f"{kind} in {dtype}" if kind else dtype
                offset = {"int4": -10, "int8-weight-only": -20}.get(kind, 4)
                left.annotate(
                    name, (x, cosine), xytext=(5, offset), textcoords="offset points", fontsize=8
                )
        layers = [row for row in rows if row["part"].startswith("layer ")]
        lost = [1 - row["centred_cosine_mean"] for row in layers]
        right.plot(range(len(layers)), lost, marker=marker, markersize=4, label=method)
    left.set(xlabel="documents a second", ylabel="centred cosine to float32, mean")
    right.set(
        xlabel="layer in int8, all others in float32",
        ylabel="1 - centred cosine to float32, mean",
        yscale="log",
    )
    for axis in (left, right):
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8)
    left.margins(x=0.2, y=0.15)
    machine = speeds[0]["machine"]
    figure.text(
        0.01,
        0.01,
        f"SmolLM2-135M; {machine['threads']} threads of {machine['cpu']}; "
        f"commit {machine['commit']}",
        fontsize=7,
        color="0.35",
    )
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
