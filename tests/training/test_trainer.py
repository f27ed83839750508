"""Whole runs: curves fall, ranks agree, and a run that was killed ends with the same bytes."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_runs import has_come_to, kill_past, losses, ranks_of, run_in_ranks

import gen_fast
from gen_fast.testing import save_tiny_model
from gen_fast.training.checkpoint import latest_checkpoint
from gen_fast.training.config import TrainConfig
from gen_fast.training.llm2vec_gen import LLM2VecGenTask, train
from gen_fast.training.records import read_records

SCRIPT = Path(__file__).parents[2] / "training" / "train.py"


def adapter_bytes(config):
    return (Path(config.out) / "adapter" / "adapter.safetensors").read_bytes()


@pytest.mark.usefixtures("curves")
def test_a_run_learns_and_leaves_a_usable_adapter(make_config):
    # Every row in every batch: a random model learns by heart, if anything.
    config = make_config(
        start="random",
        steps=30,
        batch_size=32,
        repeat_weight=0.1,
        report_to=("tensorboard",),
        log_every=5,
    )
    folder = train(config, show_progress_bar=False)
    rows = read_records(Path(config.out) / "metrics.jsonl")
    curve = {row["step"]: row for row in rows if "loss/total" in row}
    assert list(curve) == [1, *range(5, 31, 5)]
    for name in ("reconstruction", "alignment"):
        assert curve[30][f"loss/{name}"] < curve[1][f"loss/{name}"], name
    encoder = gen_fast.load(folder, dtype="float32", device="cpu")
    assert encoder.encode_query(["the cat"]).shape == (1, 16)
    assert (folder / "curves.png").stat().st_size > 10_000
    assert "30 steps of 32 texts" in (folder / "README.md").read_text()
    assert list((Path(config.out) / "tensorboard").iterdir())
    validations = [row for row in rows if "validation/mrr" in row]
    assert [row["step"] for row in validations] == list(range(3, 31, 3))
    assert 0 < validations[-1]["validation/mrr"] <= 1


def test_the_embedding_in_training_is_that_of_the_encoder(make_config):
    from tiny_data import setup

    config = make_config(n_thought=2)
    folder = train(config, show_progress_bar=False)
    student, data = setup(config)
    encoder = gen_fast.load(folder, dtype="float32", device="cpu")
    student.load_adapter(encoder.adapter)
    rows = data.validation
    _, expected = student.encode([example.query for example in data.examples(rows)])
    actual = encoder.encode([row.query for row in rows])
    np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-5)


def test_stopped_and_continued_gives_the_same_bytes(make_config):
    whole = make_config("whole", steps=6)
    train(whole, show_progress_bar=False)
    train(make_config("parts", steps=4), show_progress_bar=False)
    parts = make_config("parts", steps=6)
    train(parts, show_progress_bar=False)
    assert adapter_bytes(parts) == adapter_bytes(whole)
    assert losses(parts) == losses(whole)


KILLED = {"steps": 40, "schedule_steps": 40, "checkpoint_every": 3, "validation_rows": 2}


@pytest.mark.usefixtures("one_thread")
def test_killed_and_continued_gives_the_same_bytes(make_config):
    whole = make_config("whole", **KILLED)
    train(whole, show_progress_bar=False)
    killed = make_config("killed", **KILLED)
    kill_past(9, train, killed)
    train(killed, show_progress_bar=False)
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert losses(killed) == losses(whole)


def test_ranks_that_were_killed_and_continued_by_torchrun_give_the_same_bytes(
    make_config, tmp_path
):
    """By torchrun and the script, as a user starts them."""
    whole = make_config("whole", **KILLED)
    run_in_ranks(train, whole)
    killed = make_config("killed", **KILLED)
    with ranks_of(train, killed) as ranks:
        while not has_come_to(9, killed):
            assert all(rank.is_alive() for rank in ranks)
            time.sleep(0.01)
        for rank in ranks:
            rank.kill()
    assert not (Path(killed.out) / "adapter").exists()
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(killed.plain()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(SCRIPT), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert losses(killed) == losses(whole)


def test_two_processes_have_the_losses_of_one(make_config):
    settings = {"repeat_weight": 0.2, "margin_weight": 0.2, "margin": 3.0, "negatives": True}
    settings |= {"contrastive_weight": 0.2, "batch_size": 7}
    one, two = make_config("one", **settings), make_config("two", **settings)
    train(one, show_progress_bar=False)
    run_in_ranks(train, two)
    expected, actual = losses(one), losses(two)
    assert len(expected) == 6
    for step, value in expected.items():
        assert actual[step] == pytest.approx(value, rel=1e-5)


def test_a_checkpoint_of_other_settings_is_refused(make_config, tmp_path):
    train(make_config(steps=2), show_progress_bar=False)
    with pytest.raises(gen_fast.CheckpointError, match=r"learning_rate = 0.01, this run has 0.5"):
        train(make_config(learning_rate=0.5), show_progress_bar=False)
    other = tmp_path / "other"
    save_tiny_model(other, "llama-tied", seed=1)
    with pytest.raises(gen_fast.CheckpointError, match="trained with backbone"):
        train(make_config(backbone=str(other)), show_progress_bar=False)
    config = make_config()
    answers = Path(config.answers[0])
    answers.write_text("".join(answers.read_text().splitlines(True)[:-1]))
    with pytest.raises(gen_fast.CheckpointError, match="trained with data"):
        train(config, show_progress_bar=False)


def test_a_damaged_checkpoint_is_named(make_config):
    config = make_config(steps=2)
    train(config, show_progress_bar=False)
    folder = latest_checkpoint(Path(config.out) / "checkpoints")
    (folder / "optimizer.safetensors").write_bytes(b"nonsense")
    with pytest.raises(gen_fast.CheckpointError, match="step-00000002 is damaged"):
        train(make_config(), show_progress_bar=False)


def test_only_the_newest_checkpoints_are_kept(make_config):
    config = make_config(keep_checkpoints=2)
    train(config, show_progress_bar=False)
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]


def test_a_full_disk_leaves_the_last_checkpoint(make_config):
    config = make_config(steps=2)
    train(config, show_progress_bar=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(gen_fast.CheckpointError, match="step-00000002 is intact"):
            train(make_config(steps=6), show_progress_bar=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(make_config(steps=6), show_progress_bar=False)
    whole = make_config("whole")
    train(whole, show_progress_bar=False)
    assert adapter_bytes(config) == adapter_bytes(whole)


def test_a_loss_that_is_not_finite_is_skipped_then_refused(make_config, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    save_tiny_model(broken, "llama-tied")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(gen_fast.NonFiniteLossError, match="the backbone's states"):
        train(make_config(backbone=str(broken)), show_progress_bar=False)
    settings = {"max_skipped": 2, "checkpoint_every": 1, "start": "random"}
    config = make_config("random", backbone=str(broken), **settings)
    with pytest.raises(gen_fast.NonFiniteLossError, match="3 steps in a row"):
        train(config, show_progress_bar=False)
    assert sum("the step is skipped" in record.message for record in caplog.records) == 3
    # What was reached before is there.
    assert latest_checkpoint(Path(config.out) / "checkpoints").name == "step-00000002"


def test_a_run_of_skipped_steps_makes_no_adapter(make_config, monkeypatch):
    """Not so many in a row that it stops, and most of them all the same."""
    accumulate = LLM2VecGenTask.accumulate
    calls = []

    def sometimes(self, examples, world):
        progress = accumulate(self, examples, world)
        calls.append(len(examples))
        if len(calls) % 3:
            progress.losses["total"] = float("nan")
        return progress

    monkeypatch.setattr(LLM2VecGenTask, "accumulate", sometimes)
    config = make_config(steps=6, max_skipped=2)
    with pytest.raises(gen_fast.NonFiniteLossError, match="4 of 6 steps were skipped"):
        train(config, show_progress_bar=False)
    assert not (Path(config.out) / "adapter").exists()


def refused_for_its_batch(config, **options):
    with pytest.raises(gen_fast.ConfigError, match="batch_size 1 is less than 2 processes"):
        train(config, **options)


def test_too_many_processes_for_the_batch(make_config):
    run_in_ranks(refused_for_its_batch, make_config(batch_size=1))


@pytest.mark.parametrize(("text", "message"), [
    ("learning_rate: fast", "learning_rate must be float"),
    ("steps: 1.5", "steps must be int"),
    ("steps: .inf", "steps must be int"),
    (f"steps: {10**400}", "steps must be int"),
    ("answers: x\nteacher: t\nout: o\nlearning_rate: .nan", "must be a finite number, not nan"),
    ("answers: x\nteacher: t\nout: o\nmargin: .inf", "margin must be a finite number, not inf"),
    ("answers: x\nteacher: t\nout: o\nweight_decay: -1", "weight_decay must not be negative"),
    (f"answers: x\nteacher: t\nout: o\nseed: {2**70}", "seed must be below"),
    ("steps: true", "steps must be int"),
    ("stepz: 3", "unknown setting 'stepz'"),
    ("[1, 2]", "holds no settings"),
    ("a: [", "is not YAML"),
    ("answers: 3", "answers must be a list of strings"),
    ("answers: x\nteacher: t\nout: o\nn_compression: 0", "n_compression must be positive"),
    ("answers: x\nteacher: t\nout: o\nalignment: l1", "mse or cosine"),
    ("answers: x\nteacher: t\nout: o\nalignment_scale: sum", "or dimension or mean, not 'sum'"),
    ("answers: x\nteacher: t\nout: o\nspecial_init: zero", "mean or draw, not 'zero'"),
    ("answers: x\nteacher: t\nout: o\nmax_length: 10", "10 special tokens leave no room"),
    ("answers: x\nteacher: t\nout: o\nmargin_weight: -1", "margin_weight must not be negative"),
    ("teacher: t", "answers must be given"),
])  # fmt: skip
def test_settings_that_make_no_sense(tmp_path, text, message):
    from gen_fast.training.config import read_config, read_settings

    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(gen_fast.ConfigError, match=message):
        read_config(read_settings(path), TrainConfig)


def test_flags_override_the_file(tmp_path):
    from gen_fast.training.config import parse_flags, read_config, read_settings

    path = tmp_path / "config.yaml"
    path.write_text("answers: a.jsonl\nteacher: t\nout: o\nsteps: 7\nmicro_batch_tokens: 9\n")
    flags = ["--steps", "5", "--answers=b.jsonl", "--answers", "c.jsonl", "--prompt", "x: "]
    flags += ["--micro-batch-tokens", "null", "--report-to="]
    config = read_config({**read_settings(path), **parse_flags(flags)}, TrainConfig)
    assert config == TrainConfig(
        answers=("b.jsonl", "c.jsonl"), teacher="t", out="o", steps=5, prompt="x: ", report_to=()
    )
    for wrong in (["steps", "5"], ["--steps"]):
        with pytest.raises(gen_fast.ConfigError):
            parse_flags(wrong)


@pytest.mark.parametrize(("family", "rate"), [("llama", 5e-4), ("qwen3", 3e-4)])
def test_the_learning_rate_is_the_family_s_unless_given(make_config, tmp_path, family, rate):
    save_tiny_model(tmp_path / family, family)
    config = make_config(backbone=str(tmp_path / family), learning_rate=None, steps=1)
    folder = train(config, show_progress_bar=False)
    assert yaml.safe_load((folder / "training.yaml").read_text())["learning_rate"] == rate
    assert yaml.safe_load((folder.parent / "config.yaml").read_text())["learning_rate"] == rate
    assert make_config(learning_rate=1.0).base_learning_rate(family) == 1.0


def test_metrics_are_json(make_config):
    config = make_config(steps=2)
    train(config, show_progress_bar=False)
    for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
