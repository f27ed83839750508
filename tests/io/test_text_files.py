"""Readers of texts."""

import csv
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gen_fast.errors import InputError
from gen_fast.io.text_files import Texts, read_texts

TEXTS = ["plain", "", "naïve café ☕", 'quote " and, comma', "日本語\u2028one line"]


def write_texts(path: Path, texts: list[str], ids: list[str]) -> Path:
    if path.suffix == ".txt":
        path.write_bytes("".join(f"{text}\n" for text in texts).encode())
    elif path.suffix == ".jsonl":
        rows = zip(ids, texts, strict=True)
        path.write_text("".join(json.dumps({"key": i, "text": t}) + "\n" for i, t in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([("key", "text"), *zip(ids, texts, strict=True)])
    else:
        pq.write_table(pa.table({"key": ids, "text": texts}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_texts_come_back_in_order(tmp_path: Path, suffix: str) -> None:
    path = write_texts(tmp_path / f"in{suffix}", TEXTS, list("abcde"))
    assert read_texts(path) == Texts(list("01234"), TEXTS)
    if suffix != ".txt":
        assert read_texts(path, id_column="key") == Texts(list("abcde"), TEXTS)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_texts_may_span_lines(tmp_path: Path, suffix: str) -> None:
    path = write_texts(tmp_path / f"in{suffix}", ["one\ntwo\r\n", "three"], ["a", "b"])
    assert read_texts(path).texts == ["one\ntwo\r\n", "three"]


def test_a_text_may_be_longer_than_a_megabyte(tmp_path: Path) -> None:
    texts = ["x" * 3_000_000, "y"]
    path = write_texts(tmp_path / "in.csv", texts, ["a", "b"])
    assert read_texts(path).texts == texts


def test_txt_without_last_newline_with_crlf_and_bom(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_texts(path).texts == ["one", "two"]


def test_csv_values_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("text,key\n007,1\nNA,2\n")
    assert read_texts(path, id_column="key") == Texts(["1", "2"], ["007", "NA"])


def test_integer_ids_and_dictionary_strings(tmp_path: Path) -> None:
    texts = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"n": [3, 2, 1], "body": texts}), tmp_path / "in.parquet")
    assert read_texts(tmp_path / "in.parquet", id_column="n") == Texts(
        ["3", "2", "1"], ["a", "b", "a"]
    )


def test_format_overrules_suffix_and_empty_files_have_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "data.log"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert read_texts(path, file_format="jsonl").texts == ["a", "b"]
    for suffix in (".txt", ".jsonl"):
        empty = tmp_path / f"empty{suffix}"
        empty.touch()
        assert read_texts(empty) == Texts([], [])


def test_the_only_string_column_is_the_text(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"n": 1, "body": "b"}\n')
    (tmp_path / "in.csv").write_text("n,body\n1,b\n")
    for name in ("in.jsonl", "in.csv"):
        assert read_texts(tmp_path / name).texts == ["b"]
    (tmp_path / "two.csv").write_text("title,body\na,b\n")
    with pytest.raises(InputError, match=r"two\.csv.*title, body"):
        read_texts(tmp_path / "two.csv")
    assert read_texts(tmp_path / "two.csv", text_column="title").texts == ["a"]
    # The id column is no candidate.
    assert read_texts(tmp_path / "two.csv", id_column="title") == Texts(["a"], ["b"])


@pytest.mark.parametrize(
    ("name", "content", "where", "what"),
    [
        ("a.txt", b"ok\n\xff\n", "line 2", "UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2", "JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b"}\n', "line 3", "no column 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2", "int"),
        ("a.jsonl", b'{"text": null}\n', "line 1", "null"),
        ("a.jsonl", b'["a"]\n', "line 1", "object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1", "surrogate"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1", "JSON"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "line 1", "UTF-8"),
        ("a.csv", b"text,n\na,1\n\xff,2\n", "row 1", "UTF-8"),
        ("a.csv", b'text,n\n"a\nb",1\nc,2,3\n', "row 1", "expected 2 values, got 3"),
        ("a.csv", b"", "a.csv", "Empty"),
        ("a.parquet", b"PAR1 but not really", "a.parquet", "arquet"),
    ],
)
def test_bad_input_names_file_and_place(
    tmp_path: Path, name: str, content: bytes, where: str, what: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_texts(path)
    message = str(caught.value)
    assert str(path) in message
    assert where in message
    assert what in message


def test_bad_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(InputError, match=r"a\.parquet, row 1: .*null"):
        read_texts(path)
    with pytest.raises(InputError, match=r"column 'n' holds int64"):
        read_texts(path, text_column="n")
    with pytest.raises(InputError, match=r"no column 'x'; there are text, n"):
        read_texts(path, id_column="x")


@pytest.mark.parametrize("value", ["null", "true", "[1]"])
def test_bad_ids(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a", "key": {value}}}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: .*id"):
        read_texts(path, id_column="key")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: no such file"):
        read_texts(tmp_path / "none.csv")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match=r"folder\.txt: cannot be read"):
        read_texts(tmp_path / "folder.txt")
    with pytest.raises(InputError, match=r"suffix '\.doc'"):
        read_texts(tmp_path / "a.doc")


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl.gz", "in.csv", "in.parquet"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}: cannot be read: it is a pipe, not a file"):
        read_texts(tmp_path / name)
    with pytest.raises(InputError, match="/dev/zero: cannot be read: it is a device, not a file"):
        read_texts("/dev/zero", file_format="txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with pytest.raises(InputError, match=r"loop\.txt: cannot be read: Too many levels"):
        read_texts(tmp_path / "loop.txt")
