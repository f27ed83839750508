"""gen-fast generate, teach and train, as a user meets them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import gen_fast
from gen_fast.cli import app
from gen_fast.testing import save_tiny_model
from gen_fast.training import train
from gen_fast.training.records import read_records

WORDS = ["cat", "hat", "mat", "dog", "end", "in", "a", "then", "there", "that"]
QUERIES = [f"what is the {word}" for word in WORDS]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def talking_model(tmp_path_factory):
    """With a head of its own: a random model with a tied one repeats its last token."""
    directory = tmp_path_factory.mktemp("talking")
    save_tiny_model(directory, "llama")
    return directory


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text("\n".join([*QUERIES, "", QUERIES[0]]) + "\n")
    return path


def recipe(queries, model, out, *more):
    return run(
        "train",
        queries,
        "--out",
        out,
        "--model",
        model,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--teacher",
        model,
        "--teacher-method",
        "mean",
        "--max-new-tokens",
        6,
        "--steps",
        4,
        "--schedule-steps",
        4,
        "--n-compression",
        2,
        "--batch-size",
        3,
        "--validation-rows",
        2,
        "--report-to=",
        "--quiet",
        *more,
    )


def test_the_whole_recipe_and_again(queries, talking_model, tmp_path):
    out = tmp_path / "run"
    done = recipe(queries, talking_model, out)
    assert done.exit_code == 0, done.stderr
    assert "mrr: " in done.stdout
    found = json.loads((out / "evaluation.json").read_text())
    assert [sorted(example) for example in found["examples"]] == [
        ["answer", "decoded", "query"]
    ] * 2
    assert len(read_records(out / "answers.jsonl")) == 10
    assert len(read_records(out / "answers.rejected.jsonl")) == 2
    encoder = gen_fast.load(out / "adapter", dtype="float32", device="cpu")
    assert encoder.encode("the cat").shape == (48,)
    before = (out / "adapter" / "adapter.safetensors").read_bytes()
    assert recipe(queries, talking_model, out).exit_code == 0
    assert (out / "adapter" / "adapter.safetensors").read_bytes() == before
    other = recipe(queries, talking_model, out, "--learning-rate", "0.5")
    assert other.exit_code != 0
    assert "learning_rate" in other.stderr


def test_settings_of_the_file_hold_unless_overridden(queries, talking_model, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"backbone: {talking_model}\ndtype: float32\ndevice: cpu\nstart: random\n")
    done = run(
        "train",
        queries,
        "--out",
        tmp_path / "run",
        "--config",
        config,
        "--report-to=",
        "--teacher",
        talking_model,
        "--teacher-method",
        "mean",
        "--max-new-tokens",
        6,
        "--quiet",
        "--steps",
        1,
        "--n-compression",
        2,
        "--batch-size",
        3,
        "--validation-rows",
        0,
    )
    assert done.exit_code == 0, done.stderr
    made = (tmp_path / "run" / "config.yaml").read_text()
    assert f"backbone: {talking_model}\n" in made
    assert "dtype: float32\n" in made
    assert "start: random\n" in made


def test_stages_one_by_one(queries, talking_model, tmp_path):
    answers = tmp_path / "a.jsonl"
    options = ("--model", talking_model, "--device", "cpu", "--max-new-tokens", 5, "--quiet")
    assert run("generate", queries, "--out", answers, *options).exit_code == 0
    taught = run(
        "teach", answers, "--teacher", talking_model, "--method", "mean", "--device", "cpu"
    )
    assert taught.exit_code == 0, taught.stderr
    assert (tmp_path / "a.teacher.parquet").exists()
    other = run("generate", queries, "--out", answers, *options, "--temperature", 0.5)
    assert other.exit_code == 3
    assert "temperature" in other.stderr
    greedy = run("generate", queries, "--out", answers, *options, "--top-k", 5)
    assert greedy.exit_code == 2
    assert "--top-k need a --temperature" in greedy.stderr


def test_answers_are_drawn_as_the_model_s_own_settings_say(queries, tmp_path):
    model, answers = tmp_path / "model", tmp_path / "a.jsonl"
    save_tiny_model(model, "llama")
    (model / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.9}')
    options = ("--model", model, "--device", "cpu", "--max-new-tokens", 5, "--quiet")

    def settings(*more):
        answers.unlink(missing_ok=True)
        done = run("generate", queries, "--out", answers, *options, *more)
        assert done.exit_code == 0, done.stderr
        kept = json.loads((tmp_path / "a.jsonl.settings.json").read_text())
        return [kept[name] for name in ("temperature", "top_p", "top_k", "seed")]

    assert settings() == [1.0, 0.9, 50, 0]
    assert settings("--temperature", 0) == [0.0, 0.9, 50, 0]
    chosen = settings("--temperature", 0.5, "--top-p", 0.8, "--top-k", 7, "--seed", 3)
    assert chosen == [0.5, 0.8, 7, 3]


@pytest.mark.parametrize(("arguments", "message"), [
    (("generate",), "give a file of queries or --self-queries"),
    (("generate", "q.txt", "--self-queries", 3), "give a file of queries or --self-queries"),
    (("generate", "q.txt", "--out", "a.txt"), "does not end in .jsonl"),
    (("generate", "q.txt", "--shard", "4/4"), "is not I/N"),
    (("teach", "a.jsonl", "--out", "t.npy"), "does not end in .parquet"),
    (("train",), "give a file of queries or --self-queries"),
    (("train", "q.txt", "--stepz", "3"), "unknown setting 'stepz'"),
])  # fmt: skip
def test_wrong_usage(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "many"], "batch_size"),
        (["--no-such-setting", "1"], "no_such_setting"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_the_script_says_what_is_wrong_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_script_ends_with_that_line(tmp_path):
    script = Path(train.__file__)
    done = subprocess.run(
        [sys.executable, script, "missing.yaml"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "missing.yaml" in done.stderr.splitlines()[-1]
