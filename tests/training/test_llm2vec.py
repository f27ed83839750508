"""LLM2Vec's steps as whole runs: they learn, resume to the same bytes, and follow each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from peft import PeftModel
from tiny_runs import ADAPTED, kill_past, losses, run_in_ranks
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import gen_fast
from gen_fast.cli import app
from gen_fast.formats.peft import read_adapter
from gen_fast.training.checkpoint import latest_checkpoint
from gen_fast.training.llm2vec import train
from gen_fast.training.llm2vec_config import DEFAULTS, LLM2VecConfig
from gen_fast.training.records import read_records

WORDS = "a seal swims under the ice while birds look for fish near the shore".split()  # noqa: SIM905


@pytest.fixture
def make_config(tiny_model, tmp_path):
    """Call with a step and settings to get a configuration over fresh data."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(3, 12)))) for _ in range(60)]
    (tmp_path / "texts.txt").write_text("\n".join([*texts, ""]) + "\n")
    rows = [
        {"id": str(i), "query": text, "answer": text[::-1], "negative_answer": texts[i - 1]}
        for i, text in enumerate(texts)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(step, out="run", **settings):
        values = {
            **ADAPTED,
            "step": step,
            "texts": (str(tmp_path / ("rows.jsonl" if step == "supervised" else "texts.txt")),),
            "out": str(tmp_path / out),
            "backbone": str(tiny_model),
            "warmup_steps": 0,
        }
        return LLM2VecConfig(**(values | settings))

    return make


def adapter_bytes(config):
    return (Path(config.out) / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("step", ["mntp", "simcse", "supervised"])
def test_stopped_and_continued_gives_the_same_bytes(make_config, step):
    whole = make_config(step, "whole")
    folder = train(whole, show_progress_bar=False)
    train(make_config(step, "parts", steps=2), show_progress_bar=False)
    parts = make_config(step, "parts", micro_batch_tokens=None)
    train(parts, show_progress_bar=False)
    assert losses(parts) == losses(whole)
    assert adapter_bytes(parts) == adapter_bytes(whole)
    rows = read_records(Path(whole.out) / "metrics.jsonl")
    assert [r["step"] for r in rows if "validation/loss" in r] == [2, 4]
    assert "4 steps of 6 texts" in (folder / "README.md").read_text()
    assert read_adapter(folder).base == whole.backbone


@pytest.mark.usefixtures("one_thread")
def test_killed_and_continued_gives_the_same_bytes(make_config):
    settings = {"steps": 30, "schedule_steps": 30, "checkpoint_every": 3, "validation_rows": 2}
    whole = make_config("simcse", "whole", **settings)
    train(whole, show_progress_bar=False)
    killed = make_config("simcse", "killed", **settings)
    kill_past(9, train, killed)
    train(killed, show_progress_bar=False)
    assert adapter_bytes(killed) == adapter_bytes(whole)
    assert losses(killed) == losses(whole)


@pytest.mark.parametrize("step", ["mntp", "simcse"])
def test_two_ranks_give_what_one_gives(make_config, step):
    """The texts of a batch are gathered, so that each is told from all others."""
    one = make_config(step, "one", lora_dropout=0.1)
    train(one, show_progress_bar=False)
    two = make_config(step, "two", lora_dropout=0.1)
    run_in_ranks(train, two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_a_step_goes_on_from_the_one_before(make_config, tiny_model):
    first = train(make_config("mntp", "first", learning_rate=1e-2), show_progress_bar=False)
    second = train(
        make_config("simcse", "second", backbone=str(first), learning_rate=1e-2),
        show_progress_bar=False,
    )
    third = train(
        make_config("supervised", "third", backbone=str(first), lora_start=str(second)),
        show_progress_bar=False,
    )
    assert read_adapter(third).base == str(first)
    for folder in (first, second, third):
        vectors = gen_fast.load(folder, dtype="float32", device="cpu").encode(["a seal", "fish"])
        assert vectors.shape == (2, 48)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    PeftModel.from_pretrained(base, first)  # a published adapter is one of PEFT's


def test_a_start_must_fit_what_it_is_put_on(make_config, tiny_model):
    first = train(make_config("mntp", "first", steps=1), show_progress_bar=False)
    second = train(
        make_config("simcse", "second", steps=1, backbone=str(first)), show_progress_bar=False
    )
    with pytest.raises(gen_fast.BackboneMismatchError, match="adapters_sha256"):
        train(make_config("supervised", "third", lora_start=str(second)), show_progress_bar=False)
    with pytest.raises(gen_fast.ConfigError, match=r"has scale 8\.0, this run 4\.0"):
        train(
            make_config(
                "supervised",
                "third",
                backbone=str(first),
                lora_start=str(second),
                lora_alpha=16.0,
            ),
            show_progress_bar=False,
        )


def test_a_run_goes_on_from_the_same_start_and_rows_only(make_config, tmp_path):
    first = train(make_config("simcse", "first", steps=1), show_progress_bar=False)
    second = make_config("simcse", "second", lora_start=str(first), steps=1)
    train(second, show_progress_bar=False)
    moved = first.rename(tmp_path / "moved")
    train(make_config("simcse", "second", lora_start=str(moved)), show_progress_bar=False)
    with pytest.raises(gen_fast.CheckpointError, match="lora_start_sha256"):
        train(make_config("simcse", "second"), show_progress_bar=False)
    (tmp_path / "texts.txt").write_text((tmp_path / "texts.txt").read_text()[::-1].strip())
    with pytest.raises(gen_fast.CheckpointError, match="data"):
        train(make_config("simcse", "second", lora_start=str(moved)), show_progress_bar=False)


def test_a_checkpoint_says_how_it_embeds(make_config):
    config = make_config("simcse", steps=1)
    train(config, show_progress_bar=False)
    folder = latest_checkpoint(Path(config.out) / "checkpoints") / "adapter"
    encoder = gen_fast.load(folder, dtype="float32", device="cpu")
    assert (encoder.method, encoder.max_length) == ("llm2vec", 512)


def test_the_command_line_takes_settings_files_and_refuses_what_has_no_meaning(
    make_config, tmp_path
):
    config = make_config("simcse", "run", steps=1)
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({"method": "llm2vec", **config.plain()}))
    result = CliRunner().invoke(app, ["train", "--config", str(path), "-q"])
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "run" / "adapter") in result.output
    for option in (["--teacher", "minilm"], ["--split", "test"], ["--format", "jsonl"]):
        result = CliRunner().invoke(app, ["train", "--config", str(path), *option])
        assert result.exit_code != 0
        assert "means nothing with --method llm2vec" in result.output


@pytest.mark.usefixtures("curves")
def test_a_run_learns(make_config):
    config = make_config(
        "supervised",
        steps=20,
        schedule_steps=60,
        learning_rate=1e-2,
        batch_size=24,
        validate_every=10,
        checkpoint_every=20,
    )
    folder = train(config, show_progress_bar=False)
    assert (folder / "curves.png").stat().st_size > 10_000
    curve = losses(config)
    assert np.mean([curve[i] for i in (18, 19, 20)]) < 0.8 * curve[1]


def test_defaults_are_those_of_the_step():
    config = LLM2VecConfig(step="simcse", texts=("-",), out="-")
    assert {name: getattr(config, name) for name in DEFAULTS["simcse"]} == DEFAULTS["simcse"]
    assert LLM2VecConfig(step="simcse", texts=("-",), out="-", batch_size=3).batch_size == 3


@pytest.mark.parametrize(
    ("step", "settings", "message"),
    [
        ("simcse", {"attention_dropout": 0.0, "lora_dropout": 0.0}, "the same text twice"),
        ("mntp", {"mask_token": "no such token"}, "no mask_token 'no such token'"),
        ("mntp", {"max_length": 100_000}, "fewer than max_length"),
        ("mntp", {"mask_probability": 1.5}, "at most 1"),
        ("simcse", {"validation_rows": 60}, "none is left"),
        ("everything", {}, "step must be mntp or simcse or supervised"),
        ("simcse", {"batch_size": 0}, "batch_size must be positive"),
        ("simcse", {"batch_size": 60}, "as each other's negatives"),
        ("simcse", {"query_prompt": "x"}, "query_prompt means nothing in the step simcse"),
        ("mntp", {"dtype": "float16"}, "float16 loses small gradients"),
    ],
)
def test_settings_without_meaning_are_refused(make_config, step, settings, message):
    with pytest.raises(gen_fast.ConfigError, match=message):
        train(make_config(step, **settings), show_progress_bar=False)


def test_empty_texts_are_counted_and_missing_negatives_refused(make_config, tmp_path):
    config = make_config("simcse", steps=1)
    train(config, show_progress_bar=False)
    (row,) = read_records(Path(config.out) / "rejected.jsonl")
    assert row["reason"] == "empty text"
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    first = {k: v for k, v in json.loads(rows[0]).items() if k != "negative_answer"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(first), *rows[1:]]) + "\n")
    with pytest.raises(gen_fast.InputError, match="1 of 60 rows have no negative_answer"):
        train(make_config("supervised", "other"), show_progress_bar=False)
