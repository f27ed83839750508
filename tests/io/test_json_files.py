"""Damaged JSON: one ValueError that names the file."""

import os
from pathlib import Path

import pytest

from gen_fast.io.json_files import parse_json, read_json_object


def test_an_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, "é"]}', encoding="utf-8")
    assert read_json_object(path) == {"a": [1, "é"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[1]", "a list, expected a JSON object"),
        (b"null", "null, expected a JSON object"),
        (b"true", "a boolean, expected"),
        (b"1.5", "a number, expected"),
        (b'"a"', "a string, expected"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json_object(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_stays_that(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "none.json")


def test_a_line() -> None:
    assert parse_json("[1]") == [1]
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="it is a pipe"):
        read_json_object(tmp_path / "config.json")
