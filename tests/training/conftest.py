"""A tiny model, a few dozen rows with random teacher vectors, and a configuration for both."""

import pytest
import torch
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


@pytest.fixture
def curves():
    """The curves of a run are drawn, which takes as long as the rest of a tiny one."""


@pytest.fixture(autouse=True)
def _no_curves_unless_asked_for(request, monkeypatch):
    if "curves" not in request.fixturenames:
        for module in ("llm2vec_gen", "adapted_task"):
            monkeypatch.setattr(f"gen_fast.training.{module}.draw_curves", lambda *_: None)


@pytest.fixture
def one_thread():
    """For results that are compared, to the bit, with those of processes of one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
