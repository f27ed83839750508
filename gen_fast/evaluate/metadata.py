"""What mteb wants to know of a task and is the same for all of ours."""

from typing import Any

from mteb.abstasks.task_metadata import TaskMetadata


def task_metadata(**fields: Any) -> TaskMetadata:
    """Metadata of a task on English text; `fields` are the task's own, and win."""
    common = {
        "reference": "https://github.com/embeddings-benchmark/mteb",
        "category": "t2t",
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "date": ("2000-01-01", "2026-01-01"),
        "domains": ["Written"],
        "task_subtypes": [],
        "annotations_creators": "derived",
        "dialect": [],
        "modalities": ["text"],
        "sample_creation": "found",
        "bibtex_citation": "",
    }
    return TaskMetadata(**{**common, **fields})
