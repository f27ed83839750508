"""`gen-fast eval` as a user meets it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from gen_fast.cli import app
from gen_fast.evaluate import corpora
from gen_fast.evaluate.corpora import Trivia
from gen_fast.evaluate.local_tasks import _trivia
from gen_fast.testing import save_tiny_adapter


@pytest.fixture(autouse=True)
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    # Unlike each other: rounding must not decide which of two answers is the nearer.
    letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), (30, 2, 12))
    questions = [
        Trivia(f"topic{i % 2}", f"who is {''.join(question)}?", ("".join(answer),))
        for i, (question, answer) in enumerate(letters)
    ]
    monkeypatch.setattr(corpora, "trivia", lambda: questions)
    _trivia.cache_clear()
    yield
    _trivia.cache_clear()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_scores_with_standard_errors(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--tasks", "TriviaAnswers", "--out", tmp_path, "--quiet")
    printed = run(*options)
    assert printed.exit_code == 0, printed.stderr
    name, kind, score, sign, error = printed.stdout.split()
    assert (name, kind, sign) == ("TriviaAnswers", "Retrieval", "±")
    again = run(*options, "--json", "--trained-on", "trivia")
    row = json.loads(again.stdout)
    assert row["score"] == pytest.approx(float(score), abs=6e-4)
    assert row["standard_error"] == pytest.approx(float(error), abs=6e-4)
    assert row["in_domain"]
    file = next(tmp_path.glob(f"results/*{tiny_model.name}-mean/*/TriviaAnswers.json"))
    assert json.loads(file.read_text())["task_name"] == "TriviaAnswers"


def test_scores_go_into_the_card_of_an_export(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--tasks", "TriviaAnswers", "--out", tmp_path, "--quiet")
    score = json.loads(run(*options, "--json").stdout)["score"]
    export = ["export", str(tiny_model), "--out", str(tmp_path / "exported"), "--quiet"]
    export += ["--results", str(tmp_path), "--method", "mean"]
    refused = CliRunner().invoke(app, [*export, "--name", "another"])
    assert f"has no scores of 'another', only of {tiny_model.name}-mean" in refused.stderr
    made = CliRunner().invoke(app, export)
    assert made.exit_code == 0, made.stderr
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"| Retrieval | TriviaAnswers | main score, % | {round(100 * score, 2)} ± " in card


def test_an_export_has_the_scores_of_its_encoder(tiny_model: Path, tmp_path: Path) -> None:
    adapter, exported = tmp_path / "adapter", tmp_path / "exported"
    save_tiny_adapter(adapter, tiny_model)
    made = CliRunner().invoke(app, ["export", str(adapter), "--out", str(exported), "--quiet"])
    assert made.exit_code == 0, made.stderr
    common = ["--tasks", "TriviaAnswers", "--json", "--quiet"]
    common += ["--instructions", "llm2vec-gen", "--dtype", "float32", "--out", tmp_path / "results"]
    own = run("--model", adapter, *common).stdout.splitlines()
    stock = run("--model", exported, "--stock", *common).stdout.splitlines()
    assert len(own) == len(stock) == 1
    assert json.loads(own[0])["score"] == pytest.approx(json.loads(stock[0])["score"], abs=1e-4)


def test_wrong_usage(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--out", tmp_path, "--quiet")
    for more, message in (
        (("--tasks", "Nothing"), "no task named 'Nothing'"),
        (("--instructions", "none.yaml"), "cannot be read"),
        (("--stock", "--method", "mean"), "--method, --backbone, --quantize have no meaning"),
    ):
        result = run(*options, *more)
        assert result.exit_code != 0
        assert message in result.stderr
        assert result.stdout == ""


def test_without_mteb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("gen_fast.evaluate.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mteb", None)
    result = run("--tasks", "TriviaAnswers", "--out", tmp_path)
    assert result.exit_code != 0
    assert not list(tmp_path.iterdir())
    assert "pip install 'gen-fast[eval]'" in result.stderr
