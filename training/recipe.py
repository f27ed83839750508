"""The whole recipe in one directory: generate, teach, train, evaluate."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen_fast.embed.loading import load
from gen_fast.embed.reading import Reader
from gen_fast.io.text_files import Texts
from gen_fast.model.generation import AnswerGenerator
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.training.answers import generate_answers
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Row, TrainingData
from gen_fast.training.llm2vec_gen import train
from gen_fast.training.records import Rejections
from gen_fast.training.report import summary
from gen_fast.training.teach import teach

logger = logging.getLogger(__name__)

EXAMPLES = 12


def run_recipe(
    queries: Texts,
    config: TrainConfig,
    generator: AnswerGenerator,
    teacher: str,
    *,
    teacher_method: str | None = None,
    show_progress_bar: bool | None = None,
) -> Mapping[str, Any]:
    """Make an adapter in config.out/adapter; return the figures of <out>/evaluation.json.

    config.answers and config.teacher name the files that are made. Each stage goes on where it
    stopped. Raises as the stages do.
    """
    out = Path(config.out)
    answers = Path(config.answers[0])
    generate_answers(queries, answers, generator, show_progress_bar=show_progress_bar)
    if not Path(config.teacher).exists():
        teach(
            config.answers,
            Path(config.teacher),
            teacher,
            method=teacher_method,
            device=config.device,
            show_progress_bar=show_progress_bar,
        )
    folder = train(config, show_progress_bar=show_progress_bar)
    figures = evaluate(config, folder)
    (out / "evaluation.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return figures


def evaluate(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """The last validation figures, and some held-out queries with what their embeddings say."""
    rows = held_out_rows(config)[:EXAMPLES]
    figures: dict[str, Any] = {
        name.split("/")[1]: value for name, value in summary(Path(config.out))
    }
    if rows:
        encoder = load(
            folder,
            backbone=config.backbone,
            device=config.device,
            dtype=config.dtype,
            quantize=config.quantize,
        )
        reader = Reader(encoder)
        soft = reader.soft_prompts([row.query.strip() for row in rows], config.prompt)
        figures["examples"] = [
            {"query": row.query, "answer": row.answer, "decoded": read.text}
            for row, read in zip(rows, reader.read(soft, 64), strict=True)
        ]
    return figures


def held_out_rows(config: TrainConfig) -> list[Row]:
    """The rows that a run keeps for validation."""
    tokenizer = load_tokenizer(resolve(config.backbone, config.backbone_revision))
    return TrainingData(config, tokenizer, Rejections(Path(config.out) / "unused")).validation
