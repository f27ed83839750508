"""Rows of files: from any row on, and past rows that cannot be read."""

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gen_fast.errors import InputError
from gen_fast.io import line_files
from gen_fast.io.row_files import open_rows

TEXTS = ["plain", "naïve café ☕", 'quote " and, comma', "", "日本語\u2028one line"] * 5
FORMATS = [".txt", ".jsonl", ".csv", ".parquet"]
COMPRESSED = [f"{suffix}{packed}" for suffix in FORMATS[:3] for packed in (".gz", ".zst")]


def content_of(suffix: str, texts: list[str]) -> bytes:
    if suffix == ".txt":
        return "".join(f"{text}\n" for text in texts).encode()
    if suffix == ".jsonl":  # with lines that are no rows
        return "".join(json.dumps({"text": text}) + "\n \n" for text in texts).encode()
    if suffix == ".csv":
        stream = io.StringIO()
        csv.writer(stream).writerows(
            [["n", "text"], *([i, f"{t}\n!"] for i, t in enumerate(texts))]
        )
        return b"\xef\xbb\xbf" + stream.getvalue().encode()
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), stream, row_group_size=7)
    return stream.getvalue()


def write(folder: Path, suffixes: str, texts: list[str]) -> Path:
    path = folder / f"in{suffixes}"
    kinds = path.suffixes
    content = content_of(kinds[0], texts)
    if kinds[-1] == ".gz":  # of two members, as appending to a log gives
        content = gzip.compress(content[:50]) + gzip.compress(content[50:])
    elif kinds[-1] == ".zst":
        codec = pa.Codec("zstd")
        content = b"".join(
            codec.compress(part, asbytes=True) for part in (content[:50], content[50:])
        )
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [*FORMATS, *COMPRESSED])
@pytest.mark.parametrize("every", [1, 4, 25, 100])
def test_reading_begins_at_any_position(tmp_path: Path, suffix: str, every: int) -> None:
    path = write(tmp_path, suffix, TEXTS)
    file = open_rows(path)
    *starts, end = file.positions(every)
    assert [start.row for start in starts] == list(range(0, len(TEXTS), every))
    assert end.row == len(TEXTS)
    expected = list(file.rows(["text"]))
    assert [row.number for row in expected] == list(range(len(TEXTS)))
    ending = "\n!" if ".csv" in suffix else ""
    assert [row.values["text"].replace("\r\n", "\n") for row in expected] == [
        text + ending for text in TEXTS
    ]
    for start in starts:
        assert list(file.rows(["text"], start)) == expected[start.row :]


def test_a_file_of_bad_rows_gives_the_good_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\n\xff\nb")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n[1]\n\xff\n{"text": "b"}')
    (tmp_path / "a.csv").write_bytes(b'text,n\na,1\n"x"y,2\n\xff,3\n1,2,3\nb,4\n"cut')
    pq.write_table(
        pa.table({"text": pa.array([b"a", b"\xff", b"b"]).view(pa.string())}),
        tmp_path / "a.parquet",
    )
    for suffix, problems in [(".txt", 1), (".jsonl", 3), (".csv", 4), (".parquet", 1)]:
        rows = list(open_rows(tmp_path / f"a{suffix}").rows(["text"]))
        assert [row.values["text"] for row in rows if row.problem is None] == ["a", "b"], suffix
        assert sum(row.problem is not None for row in rows) == problems


@pytest.mark.parametrize("suffix", [*FORMATS[:3], *COMPRESSED])
@pytest.mark.parametrize("last", [False, True])
def test_a_line_too_long_to_be_held_is_one_bad_row(
    tmp_path: Path, suffix: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_files, "_LINE_BYTES", 1000)
    texts = ["first", "x" * 5000] + ["after"] * (not last)
    file = open_rows(write(tmp_path, suffix, texts))
    rows = list(file.rows(["text"]))
    problems = [row.problem is not None for row in rows]
    assert problems[:2] == [False, True]
    assert "more than 1000 bytes" in (rows[1].problem or "")
    if not last:
        assert rows[-1].values["text"].startswith("after")
        assert rows[-1].problem is None
    # Reading from the row behind it finds the place.
    *starts, _ = file.positions(1)
    assert list(file.rows(["text"], starts[-1])) == rows[-1:]


@pytest.mark.parametrize(
    "record",
    [
        b'"one\n' + b"x" * 5000 + b'",1\n',  # the long line closes a field
        b'"' + b"x" * 5000 + b'\none",1\n',  # opens one
        b'a"' + b"x" * 5000 + b"\n",  # has a quote that means nothing
    ],
)
def test_a_long_line_of_a_quoted_field_takes_no_rows_with_it(
    tmp_path: Path, record: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_files, "_LINE_BYTES", 1000)
    good = b"".join(b'"good, %d",%d\n' % (i, i) for i in range(6))
    (tmp_path / "in.csv").write_bytes(b"text,n\nfirst,0\n" + record + good)
    rows = list(open_rows(tmp_path / "in.csv").rows(["text"]))
    texts = [row.values["text"] for row in rows if row.problem is None]
    assert texts[0] == "first"
    assert texts[-5:] == [f"good, {i}" for i in range(1, 6)]
    assert any("more than 1000 bytes" in (row.problem or "") for row in rows)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_off_is_an_error(tmp_path: Path, suffix: str) -> None:
    texts = [f"text {i} {i * i}" for i in range(5000)]
    path = write(tmp_path, f".txt{suffix}", texts)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"in\.txt"):
        list(open_rows(path).rows(["text"]))


def csv_with(tmp_path: Path, changes: dict[int, str], count: int = 1000) -> Path:
    """A csv file of two columns, a row a line from line 2 on; some rows are other ones."""
    rows = [changes.get(i, f"r{i},text {i}") for i in range(count)]
    path = tmp_path / "in.csv"
    path.write_text("\n".join(["id,text", *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {110: 'r110,"never closed'},
        {110: 'r110,"closed by a stray quote', 999: 'r999,far behind"'},
        {110: 'r110,"closed by the quote of a value', 500: 'r500,"that is right"'},
        {110: '"r110,text', 200: 'x",text'},
    ],
)
def test_a_quote_that_swallows_rows_is_an_error_with_its_line(
    tmp_path: Path, changes: dict[int, str]
) -> None:
    file = open_rows(csv_with(tmp_path, changes))
    with pytest.raises(InputError, match=r"in\.csv, line 112: a quote opens in this row"):
        list(file.rows(["text"]))


def test_a_quote_that_is_never_closed_is_said_before_the_file_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_files, "_ROW_CHARACTERS", 2000)
    file = open_rows(csv_with(tmp_path, {3: 'r3,"open'}))
    with pytest.raises(InputError, match=r"line 5: .* up to line 1\d\d would be one value"):
        list(file.rows(["text"]))


def test_a_quote_closed_after_a_few_lines_is_a_bad_row_that_names_them(tmp_path: Path) -> None:
    changes = {110: 'r110,"open', 113: 'r113,"closed" in the wrong place'}
    rows = list(open_rows(csv_with(tmp_path, changes)).rows(["text"]))
    (bad,) = (row for row in rows if row.problem is not None)
    assert bad.problem is not None
    assert "(lines 112 to 115)" in bad.problem
    assert len(rows) == 997


@pytest.mark.parametrize(
    "text",
    [
        "a quote\n" * 1000,  # in no line are there as many commas as in a row
        "prose, of a kind\n" * 30 + "and without a comma\n" + "prose, again\n" * 30,
        "few, lines\n" * 20,
    ],
)
def test_a_value_of_many_lines_is_one_row(tmp_path: Path, text: str) -> None:
    rows = list(open_rows(csv_with(tmp_path, {5: f'r5,"{text}"'})).rows(["text"]))
    assert len(rows) == 1000
    assert rows[5].values["text"] == text


def test_lines_of_a_file_with_one_column_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('text\nfirst\n"' + "line\n" * 50 + '"\nlast\n')
    assert len(list(open_rows(path).rows(["text"]))) == 3
