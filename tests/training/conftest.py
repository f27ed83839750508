"""A tiny model, a few dozen rows with random teacher vectors, and a configuration for both."""

import pytest
from tiny_data import write_answers, write_teacher

from gen_fast.training.config import TrainConfig


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
