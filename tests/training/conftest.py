"""A tiny model, a few dozen rows with random teacher vectors, and a configuration for both."""

import pytest
from tiny_data import train_config, write_answers, write_teacher


@pytest.fixture
def make_config(tiny_model, tmp_path):
    """Call with settings to get a TrainConfig over fresh data."""

    def make(out="run", negatives=False, **settings):
        answers, teacher = tmp_path / f"answers{negatives}.jsonl", tmp_path / "teacher.parquet"
        write_answers(answers, negatives=negatives)
        write_teacher(teacher, answers)
        values = {"answers": (str(answers),), "out": str(tmp_path / out)}
        return train_config(tmp_path, tiny_model, **(values | settings))

    return make
