"""Rows, teacher vectors and a student for the tests of training."""

import json
from pathlib import Path

import numpy as np
import torch

from gen_fast.io.embedding_files import Embeddings, write_embeddings
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import TrainingData, read_rows, teacher_texts
from gen_fast.training.records import Rejections
from gen_fast.training.student import Student

WORDS = ["the", "cat", "in", "a", "hat", "sat", "on", "that", "mat", "and", "then", "dog"]
DIMENSION = 16


def write_answers(path, count=40, negatives=False):
    rng = np.random.default_rng(0)

    def text(most):
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    rows = []
    for i in range(count):
        row = {"id": f"r{i}", "query": text(12), "answer": text(20), "finish_reason": "stop"}
        if negatives:
            row |= {"negative_query": text(12), "negative_answer": text(20)}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_teacher(path, answers, dimension=DIMENSION, size=1.0):
    ids, texts = teacher_texts(read_rows([answers], Rejections(path.with_suffix(".no"))))
    vectors = size * np.random.default_rng(1).normal(size=(len(ids), dimension))
    vectors = vectors.astype(np.float32)
    write_embeddings(path, Embeddings(ids, vectors, texts))


def train_config(folder, model, **settings):
    """A TrainConfig of a short run in folder/run over folder/answers.jsonl, teacher.parquet."""
    values = {
        "answers": (str(folder / "answers.jsonl"),),
        "teacher": str(folder / "teacher.parquet"),
        "out": str(folder / "run"),
        "backbone": str(model),
        "dtype": "float32",
        "device": "cpu",
        "n_compression": 3,
        "batch_size": 6,
        "steps": 6,
        "schedule_steps": 20,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "validation_rows": 8,
        "validate_every": 3,
        "checkpoint_every": 2,
        "log_every": 1,
        "report_to": (),
    }
    return TrainConfig(**(values | settings))


def setup(config, dtype=torch.float32):
    source = resolve(config.backbone)
    backbone = load_backbone(source, dtype=dtype)
    data = TrainingData(config, load_tokenizer(source), Rejections(Path(config.out)))
    head = load_head(source, backbone)
    return Student(backbone, head, data.dimension, config, data.teacher_variance), data
