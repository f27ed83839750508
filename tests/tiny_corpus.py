"""Corpora for the tests of jobs, and a process that can be killed while it works on one."""

import json
import os
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from warm_processes import processes

from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Plan
from gen_fast.jobs.worker import Worker

ROWS = 400


def write_corpus(path: Path, rows: int, first: int = 0) -> Path:
    """Rows with ids, titles and texts of many lengths; every 50th is bad in one of five ways."""
    lines = []
    for i in range(first, first + rows):
        row: dict[str, Any] = {"key": f"k{i}", "title": f"title {i}", "n": i}
        row["text"] = f"text number {i} " * (1 + i % 7)
        if i % 50 == 7:
            bad = [("text", ""), ("text", "a\0b"), ("text", 5), ("key", None), ("key", "k0")]
            row.update([bad[i // 50 % len(bad)]])
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def options(model: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of embed_corpus for a corpus of write_corpus."""
    return {
        "model": model,
        "dtype": "float32",
        "text_column": "text",
        "id_column": "key",
        "rows_per_part": 16,
        "prompt": "say: ",
        **changes,
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """What a finished job must have whatever happened to it on the way."""
    names = [*folder.glob("part-*"), folder / "rejected.jsonl", folder / "manifest.json"]
    return {path.name: path.read_bytes() for path in names}


def embed_in_process(sources: Sequence[Path], out: Path, settings: dict[str, Any]) -> BaseProcess:
    """Begin a job in a process of its own."""
    process = processes.Process(target=_embed, args=(list(sources), out, settings))
    process.start()
    return process


def _embed(sources: list[Path], out: Path, settings: dict[str, Any]) -> None:
    _quiet()
    embed_corpus(sources, out, **settings)


def work_in_process(out: Path, index: int, count: int) -> BaseProcess:
    """Begin one of several workers of a job that has a plan."""
    process = processes.Process(target=_work, args=(out, index, count))
    process.start()
    return process


def _work(out: Path, index: int, count: int) -> None:
    _quiet()
    plan = Plan.load(out)
    Worker(out, plan, plan.settings.load_encoder("cpu"), index=index, count=count).run()


def _quiet() -> None:
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def finished_parts(out: Path) -> int:
    """How many parts of a job are there; none before there is a plan."""
    if not (out / "plan.json").exists():
        return 0
    return sum(1 for _ in PartStore(out, Plan.load(out)).finished())
