"""Keeps the single items of a task's score, and its standard error, in mteb's own results.

mteb computes scores of queries and pairs and returns their mean. What is recorded stands beside it
in the same file: `items` and `standard_error`.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from mteb import AbsTask
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)

from gen_fast.evaluate.items import Items

# pytrec_eval's names of what mteb calls, for example, ndcg_at_10.
_RETRIEVAL_METRICS = {
    "ndcg": "ndcg_cut",
    "map": "map_cut",
    "recall": "recall",
    "precision": "P",
    "hit_rate": "success",
}


def record_items(task: AbsTask) -> None:
    """Have `task` put the items of its main score, and its standard error, among its scores.

    Tasks of other types, and main scores that are no mean over items, stay as they are. Where mteb
    takes the best of several similarities, as for some pairs, items and error are of the model's
    own one.
    """
    if isinstance(task, AbsTaskRetrieval):
        _record_retrieval(task)
    elif isinstance(task, AbsTaskSTS):
        _record_sts(task)
    elif isinstance(task, AbsTaskPairClassification):
        _record_pairs(task)
    elif isinstance(task, AbsTaskClassification):
        _record_classification(task)
    elif isinstance(task, AbsTaskClustering):
        _record_clustering(task)


def _scores(items: Items) -> dict[str, Any]:
    return {"standard_error": items.standard_error(), "items": items.as_json()}


def _numbered(statistic: str, values: Any, gold: Any = ()) -> Items:
    """Items that are told by their place in the data."""
    values = np.asarray(values, dtype=np.float64)
    ids = tuple(map(str, range(len(values))))
    return Items(statistic, ids, values, np.asarray(gold, dtype=np.float64))


def _replace(task: AbsTask, method: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Give this one task what `make` makes of a method of its class."""
    setattr(task, method, make(getattr(task, method)))


def _record_retrieval(task: AbsTaskRetrieval) -> None:
    match = re.fullmatch(r"(\w+)_at_(\d+)", task.metadata.main_score)
    if match is None or match[1] not in _RETRIEVAL_METRICS:
        return
    metric = f"{_RETRIEVAL_METRICS[match[1]]}_{match[2]}"

    def recording(own: Callable[..., Any]) -> Callable[..., Any]:
        def task_specific_scores(scores: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            ids = tuple(sorted(scores))
            values = np.array([scores[query][metric] for query in ids])
            items = Items("mean", ids, values, np.empty(0))
            return {**own(scores, *args, **kwargs), **_scores(items)}

        return task_specific_scores

    _replace(task, "task_specific_scores", recording)


def _record_sts(task: AbsTaskSTS) -> None:
    def recording(own: Callable[..., Any]) -> Callable[..., Any]:
        def calculate_scores(scores: Any, gold: list[float]) -> dict[str, Any]:
            values = scores["similarity_scores"]
            values = scores["cosine_scores"] if values is None else values
            return {**own(scores, gold), **_scores(_numbered("spearman", values, gold))}

        return calculate_scores

    _replace(task, "_calculate_scores", recording)


def _record_pairs(task: AbsTaskPairClassification) -> None:
    def recording(own: Callable[..., Any]) -> Callable[..., Any]:
        def compute_metrics(scores: Any, labels: list[int]) -> dict[str, Any]:
            items = _numbered("average-precision", scores["similarity_scores"], labels)
            return {**own(scores, labels), **_scores(items)}

        return compute_metrics

    _replace(task, "_compute_metrics", recording)


def _record_classification(task: AbsTaskClassification) -> None:
    """A text's item is the share of experiments, each with its own training texts, that got it."""
    right: list[np.ndarray] = []

    def run(own: Callable[..., Any]) -> Callable[..., Any]:
        def run_experiment(train: Any, test: Any, *args: Any, **kwargs: Any) -> Any:
            scores, predictions = own(train, test, *args, **kwargs)
            right.append(np.asarray(predictions) == np.asarray(test[task.label_column_name]))
            return scores, predictions

        return run_experiment

    def average(own: Callable[..., Any]) -> Callable[..., Any]:
        def calculate_avg_scores(scores: Any) -> dict[str, Any]:
            averages = dict(own(scores))
            if task.metadata.main_score == "accuracy" and len({len(hits) for hits in right}) == 1:
                averages |= _scores(_numbered("mean", np.mean(right, axis=0)))
            right.clear()
            return averages

        return calculate_avg_scores

    _replace(task, "_run_experiment", run)
    _replace(task, "_calculate_avg_scores", average)


def _record_clustering(task: AbsTaskClustering) -> None:
    def recording(own: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate_subset(*args: Any, **kwargs: Any) -> dict[str, Any]:
            scores = own(*args, **kwargs)
            draws = [value for level in scores["v_measures"].values() for value in level]
            return {**scores, **_scores(_numbered("draws", draws))}

        return evaluate_subset

    if task.metadata.main_score == "v_measure":
        _replace(task, "_evaluate_subset", recording)
