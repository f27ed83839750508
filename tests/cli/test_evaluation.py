"""`gen-fast eval` as a user meets it."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gen_fast.cli import app
from gen_fast.evaluate import corpora
from gen_fast.evaluate.corpora import Trivia
from gen_fast.evaluate.local_tasks import _trivia


@pytest.fixture(autouse=True)
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [Trivia(f"topic{i % 2}", f"who is {i}?", (f"person {i}",)) for i in range(30)]
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


def test_wrong_usage(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--out", tmp_path, "--quiet")
    for more, message in (
        (("--tasks", "Nothing"), "no task named 'Nothing'"),
        (("--instructions", "none.yaml"), "cannot be read"),
        (("--stock", "--method", "mean"), "--method and --backbone have no meaning"),
    ):
        result = run(*options, *more)
        assert result.exit_code != 0
        assert message in result.stderr
        assert result.stdout == ""


def test_without_mteb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("gen_fast.evaluate.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mteb", None)
    result = run()
    assert result.exit_code != 0
    assert "pip install 'gen-fast[eval]'" in result.stderr
