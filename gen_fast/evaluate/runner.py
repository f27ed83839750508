"""Runs tasks of mteb with a model, keeps mteb's own result files, and reads them again."""

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
from mteb import AbsTask
from mteb.cache import ResultCache
from mteb.results import TaskResult

from gen_fast.embed.choices import LLM2VEC_GEN
from gen_fast.embed.encoder import Encoder
from gen_fast.errors import CorpusError
from gen_fast.evaluate.choices import PUBLISHED_INSTRUCTIONS
from gen_fast.evaluate.embedder import Embedder, Model, limited_to
from gen_fast.evaluate.instructions import Instructions
from gen_fast.evaluate.items import Items
from gen_fast.evaluate.local_tasks import CORPUS_OF
from gen_fast.evaluate.recording import record_items
from gen_fast.evaluate.suites import TYPES, suites_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskScore:
    """The main score of a task, between 0 and 1.

    standard_error: over the choice of queries, pairs or texts; None where mteb's metric has no
    single items. items: of the score, for paired comparisons, where the task is one data set.
    in_domain: the model was trained on the task's corpus.
    """

    task: str
    kind: str
    score: float
    standard_error: float | None
    in_domain: bool
    items: Items | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of the tasks that could be run, and why others could not, by their names."""

    scores: list[TaskScore]
    failures: dict[str, str]


def evaluate(
    model: Model,
    tasks: Sequence[str] = ("local",),
    *,
    out: str | Path = "results",
    name: str | None = None,
    instructions: str | Path = "auto",
    max_length: int | None = None,
    trained_on: Sequence[str] = (),
    overwrite: bool = False,
    show_progress_bar: bool = False,
) -> Evaluation:
    """Score `model`, an Encoder or a SentenceTransformer, on `tasks`; only what is missing is run.

    tasks: "local", "mteb" for MTEB(eng, v2), "bright", "advbench-ir", or names of tasks, mteb's
    among them. out: mteb's cache of results, a file a task. name: of the model there. instructions:
    "llm2vec-gen" for those of that paper, a YAML file like instructions.yaml, "none" for the
    model's own prompts; "auto" is the first for llm2vec-gen and the last for other methods.
    max_length: tokens of a text instead of what the suite has. trained_on: corpora, or names of
    tasks, that the model was trained on.

    Raises ConfigError for a task or a setting that does not exist. Data that cannot be had are
    among the failures.
    """
    scores: list[TaskScore] = []
    failures: dict[str, str] = {}
    lines = _instructions(model, instructions)
    seen = {task for task, corpus in CORPUS_OF.items() if corpus in trained_on} | set(trained_on)
    for suite in suites_of(tasks):
        with limited_to(model, max_length or suite.max_length):
            embedder = Embedder(
                model,
                name=name or default_name(model),
                instructions=lines,
                similarity=suite.similarity,
                trained_on=sorted(seen),
            )
            for task in suite.tasks:
                try:
                    result = _run(embedder, task, Path(out), overwrite, show_progress_bar)
                    scores.append(_score(result, task.metadata.name in seen))
                except (CorpusError, OSError) as error:
                    logger.error("%s could not be run: %s", task.metadata.name, error)
                    failures[task.metadata.name] = str(error)
    return Evaluation(scores, failures)


def _run(
    embedder: Embedder, task: AbsTask, out: Path, overwrite: bool, show_progress_bar: bool
) -> TaskResult:
    task = copy.copy(task)  # mteb's own outlives this run
    record_items(task)
    results = mteb.evaluate(
        embedder,
        task,
        cache=ResultCache(out),
        overwrite_strategy="always" if overwrite else "only-missing",
        # Of the loader: an Encoder packs by itself.
        encode_kwargs={"batch_size": 1024, "show_progress_bar": show_progress_bar},
        co2_tracker=False,
        show_progress_bar=False,
    )
    return results.task_results[0]


def read_scores(out: str | Path) -> dict[str, list[TaskScore]]:
    """Scores of every model whose results lie in `out`, by its name there.

    Where a name has been given to several models or settings, a task's newest result counts.
    """
    found: dict[str, dict[str, TaskScore]] = {}
    for folder, meta in _models(Path(out)):
        known = set(meta.get("training_datasets") or ())
        results = [
            TaskResult.from_disk(file)
            for file in sorted(folder.glob("*.json"))
            if file.name != "model_meta.json"
        ]
        name = str(meta["name"]).removeprefix("gen-fast/")
        found.setdefault(name, {}).update(
            {result.task_name: _score(result, result.task_name in known) for result in results}
        )
    return {name: list(scores.values()) for name, scores in found.items()}


def _models(out: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Folders of results, the oldest first, with what is known of their models."""
    files = sorted(out.glob("results/*/*/model_meta.json"), key=lambda file: file.stat().st_mtime)
    for file in files:
        yield file.parent, json.loads(file.read_text(encoding="utf-8"))


def _score(result: TaskResult, in_domain: bool) -> TaskScore:
    """The mean over splits and subsets, whose errors are independent."""
    parts = [part for split in result.scores.values() for part in split]
    errors = [part["standard_error"] for part in parts if "standard_error" in part]
    error = None
    if len(errors) == len(parts):
        error = float(sum(e * e for e in errors) ** 0.5 / len(parts))
    items = parts[0].get("items") if len(parts) == 1 else None
    return TaskScore(
        task=result.task_name,
        kind=TYPES.get(result.task_name) or result.task_type,
        score=float(sum(part["main_score"] for part in parts) / len(parts)),
        standard_error=error,
        in_domain=in_domain,
        items=None if items is None else Items.from_json(items),
    )


def _instructions(model: Model, wanted: str | Path) -> Instructions | None:
    if wanted == "auto":
        generative = isinstance(model, Encoder) and model.method == LLM2VEC_GEN
        wanted = PUBLISHED_INSTRUCTIONS if generative else "none"
    if wanted == "none":
        return None
    return Instructions.read() if wanted == PUBLISHED_INSTRUCTIONS else Instructions.read(wanted)


def default_name(model: Model) -> str:
    """What the results of a model are called unless a name is given."""
    if isinstance(model, Encoder):
        return f"{Path(model.name).name}-{model.method}"
    return type(model).__name__
