"""A tiny model, a few dozen rows with random teacher vectors, and a configuration for both."""

import json

import numpy as np
import pytest

from gen_fast.embeddingfiles import Embeddings, write_embeddings
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import read_rows, teacher_texts
from gen_fast.training.records import Rejections

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


def write_teacher(path, answers, dimension=DIMENSION):
    ids, texts = teacher_texts(read_rows([answers], Rejections(path.with_suffix(".no"))))
    vectors = np.random.default_rng(1).normal(size=(len(ids), dimension)).astype(np.float32)
    write_embeddings(path, Embeddings(ids, vectors, texts))


@pytest.fixture
def make_config(tiny_model, tmp_path):
    """Call with settings to get a TrainConfig over fresh data."""

    def make(out="run", negatives=False, **settings):
        answers, teacher = tmp_path / f"answers{negatives}.jsonl", tmp_path / "teacher.parquet"
        write_answers(answers, negatives=negatives)
        write_teacher(teacher, answers)
        values = {
            "answers": (str(answers),),
            "teacher": str(teacher),
            "out": str(tmp_path / out),
            "backbone": str(tiny_model),
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

    return make
