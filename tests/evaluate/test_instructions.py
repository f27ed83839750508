"""What is put before the texts of a task."""

import logging

import mteb
import pytest

from gen_fast.errors import ConfigError
from gen_fast.evaluate.instructions import Instructions
from gen_fast.evaluate.suites import suites_of

PUBLISHED = Instructions.read()


def test_every_task_of_the_suites_has_an_instruction():
    names = {
        task.metadata.name
        for suite in suites_of(("local", "mteb", "bright", "advbench-ir"))
        for task in suite.tasks
    }
    assert names <= set(PUBLISHED.tasks)


def test_types_are_those_of_mteb():
    for kind in PUBLISHED.types:
        assert mteb.get_tasks(task_types=[kind])


def test_a_text_follows_after_one_space():
    line = PUBLISHED.prompt("ArguAna", "Retrieval", is_document=False)
    assert line.startswith("Generate text that refutes this claim.")
    assert line.endswith(": ")
    document = PUBLISHED.prompt("ArguAna", "Retrieval", is_document=True)
    assert document == "Summarize the following passage: "


def test_an_unknown_task_takes_the_line_of_its_type(caplog):
    with caplog.at_level(logging.INFO, "gen_fast"):
        line = PUBLISHED.prompt("Mine", "STS", is_document=False)
    assert line == "Generate text that is semantically similar to this text: "
    assert "Mine has no instruction of its own" in caplog.text
    assert PUBLISHED.prompt("Mine", "Unheard", is_document=False) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [a, b]", "mappings"),
        ("tasks: {a: 1}", "mappings"),
        ("queries: {}", "nothing else"),
        ("- a", "nothing else"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "lines.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Instructions.read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Instructions.read(tmp_path / "none.yaml")
