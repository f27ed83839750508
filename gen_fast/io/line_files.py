"""Rows of txt, jsonl and csv files, also compressed."""

import csv
import io
import json
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from gen_fast.errors import InputError
from gen_fast.io.rows import START, Position, Row, RowFile, decoded, named_errors

STDIN = "-"
# Of txt, jsonl and csv files, behind the suffix that names the format.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_CHUNK_BYTES = 1 << 20
# A longer line is no row: it is passed over without being held, and said.
_LINE_BYTES = 1 << 25
# Of a csv row's further lines. The reader of the standard library takes four bytes a character.
_ROW_CHARACTERS = 1 << 24
# A value of more lines than this that all look like rows was not meant to be one.
_MANY_LINES = 20
_SAMPLE_ROWS = 100
_BOM = b"\xef\xbb\xbf"  # what some editors put first


class _TooLong(NamedTuple):
    """In place of a line that was not held: the double quotes in it."""

    quotes: int


def _decoded(line: bytes | _TooLong) -> tuple[str, str | None]:
    """The text of a line, and what is wrong with it."""
    if isinstance(line, _TooLong):
        return "", f"a line of more than {_LINE_BYTES} bytes"
    return decoded(line)


class _LineFile(RowFile):
    """A file, or stdin, that is read line by line. A row may take several lines or none."""

    def __init__(self, source: str | Path, name: str) -> None:
        super().__init__(source, name)
        compressed = Path(source).suffix.lower() in COMPRESSIONS
        self.seekable = not compressed and name != "stdin"

    @abstractmethod
    def _spans(self, start: Position) -> Iterator[tuple[Position, Any, Position]]:
        """Yield where a row begins, what stands there, and where the next one may begin."""

    def positions(self, every: int) -> Iterator[Position]:
        end = Position()
        for begin, _, end in self._spans(Position()):  # noqa: B007 - the last end counts
            if begin.row % every == 0:
                yield begin
        yield end

    @contextmanager
    def _lines(self, start: Position) -> Iterator[IO[bytes]]:
        """The file as a stream of lines from `start` on."""
        with named_errors(self.name), ExitStack() as stack:
            if self.name == "stdin":
                yield sys.stdin.buffer  # stays open: it is not ours
                return
            stream: IO[bytes] = stack.enter_context(Path(self.source).open("rb"))
            compression = COMPRESSIONS.get(Path(self.source).suffix.lower())
            if compression is not None:
                plain = stack.enter_context(pa.CompressedInputStream(stream, compression))
                stream = stack.enter_context(io.BufferedReader(plain, _CHUNK_BYTES))
                left = start.offset
                while left > 0:
                    self.heartbeat()
                    left -= len(stream.read(min(left, _CHUNK_BYTES)) or b" " * left)
            else:
                stream.seek(start.offset)
            yield stream

    def _bounded_lines(
        self, stream: IO[bytes], offset: int
    ) -> Iterator[tuple[bytes | _TooLong, int]]:
        """Each line with its end, and its size.

        offset: of the stream. A mark that some editors put first is no part of the first line.
        """
        while line := stream.readline(_LINE_BYTES + 1):
            size = len(line)
            if size <= _LINE_BYTES or line.endswith(b"\n"):
                yield line if offset else line.removeprefix(_BOM), size
            else:
                quotes = line.count(b'"')
                while not line.endswith(b"\n") and (line := stream.readline(_CHUNK_BYTES)):
                    self.heartbeat()
                    size += len(line)
                    quotes += line.count(b'"')
                yield _TooLong(quotes), size
            offset += size

    def _numbered_lines(
        self, start: Position
    ) -> Iterator[tuple[Position, bytes | _TooLong, Position]]:
        """Lines without their ends; every one counts as a row. U+2028 and the like stay."""
        with self._lines(start) as stream:
            begin = start
            for line, size in self._bounded_lines(stream, start.offset):
                end = Position(begin.row + 1, begin.offset + size, begin.line + 1)
                if isinstance(line, bytes):
                    line = line.removesuffix(b"\n").removesuffix(b"\r")
                yield begin, line, end
                begin = end


class TxtFile(_LineFile):
    """A text a line, in the column "text". An empty line is an empty text."""

    columns = ("text",)

    def _spans(self, start: Position) -> Iterator[tuple[Position, bytes | _TooLong, Position]]:
        return self._numbered_lines(start)

    def rows(self, columns: Sequence[str], start: Position = START) -> Iterator[Row]:  # noqa: D102
        for begin, line, _ in self._spans(start):
            text, problem = _decoded(line)
            yield Row(begin.row, f"line {begin.line + 1}", {"text": text}, problem)


class JsonlFile(_LineFile):
    """An object a line; empty lines are no rows."""

    def _spans(self, start: Position) -> Iterator[tuple[Position, bytes | _TooLong, Position]]:
        skipped = 0
        for begin, line, end in self._numbered_lines(start):
            if isinstance(line, _TooLong) or line.strip():
                row = begin.row - skipped
                yield begin._replace(row=row), line, end._replace(row=row + 1)
            else:
                skipped += 1

    def rows(self, columns: Sequence[str], start: Position = START) -> Iterator[Row]:  # noqa: D102
        for begin, line, _ in self._spans(start):
            text, problem = _decoded(line)
            record: Any = {}
            if problem is None:
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError) as error:  # an over-long integer: ValueError
                    problem = f"not valid JSON: {error}"
            if not isinstance(record, dict):
                problem = f"expected a JSON object, got {type(record).__name__}"
                record = {}
            yield Row(begin.row, f"line {begin.line + 1}", record, problem)


class CsvFile(_LineFile):
    """Comma-separated values under a header; every value is text; empty lines are no rows.

    A quote that is never closed, or that a stray one closes many lines later, makes one value of
    all rows between the two. Nobody can tell where it should end, so that is an InputError.
    """

    def __init__(self, source: str | Path, name: str) -> None:
        super().__init__(source, name)
        # Of the whole process, and by default less than a long document.
        csv.field_size_limit(sys.maxsize)
        header, problem, end = next(self._records(Position()), ([], None, Position()))
        if problem or not header:
            raise InputError(f"{name}: {problem or 'Empty CSV file: there is no header'}")
        self.columns = tuple(header)
        self._first = end._replace(row=0)

    def text_columns(self) -> tuple[str, ...]:
        """The columns with a value that is not a number, among the first rows."""
        not_numbers = set()
        for row in islice(self.rows(()), _SAMPLE_ROWS):
            not_numbers |= {name for name, value in row.values.items() if not _is_number(value)}
        return tuple(name for name in self.columns or () if name in not_numbers)

    def _records(self, start: Position) -> Iterator[tuple[list[str], str | None, Position]]:
        """Yield fields, what is wrong with them, and where the next record may begin."""
        row, offset, line = start
        first_line = line  # of the record
        held = 0  # characters of it behind its first line
        at_end = False
        damage: str | None = None

        with self._lines(start) as stream:

            def feed() -> Iterator[str]:
                nonlocal offset, line, held, at_end, damage
                for content, size in self._bounded_lines(stream, offset):
                    offset, line = offset + size, line + 1
                    text, problem = _decoded(content)
                    if line - first_line > 1:
                        held += len(text)
                        if held > _ROW_CHARACTERS:
                            raise self._swallowing(first_line, line)
                    damage = damage or problem
                    if isinstance(content, _TooLong):
                        # It opens or closes a field if its quotes do: one before anything else
                        # opens a field, and ends the record as damaged where one is open.
                        yield '"' * (content.quotes % 2) + "?\n"
                    else:
                        yield text if problem is None else content.decode("utf-8", "replace")
                at_end = True

            reader = csv.reader(feed(), strict=True)
            while True:
                damage = None
                first_line, held = line, 0
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    lines = line - first_line
                    if lines > _MANY_LINES or (at_end and lines > 1):
                        raise self._swallowing(first_line, line) from error
                    fields, damage = [""], damage or f"not valid CSV: {error}"
                    if lines > 1:
                        damage += f" (lines {first_line + 1} to {line})"
                if line - first_line > _MANY_LINES and self._holds_rows(fields):
                    raise self._swallowing(first_line, line)
                if fields:
                    row += 1
                    yield fields, damage, Position(row, offset, line)

    def _holds_rows(self, fields: list[str]) -> bool:
        """Whether a value has many lines inside, each with as many commas as a row of the file."""
        commas = len(self.columns or ()) - 1
        inside = (value.split("\n")[1:-1] for value in fields)
        return commas > 0 and any(
            len(lines) >= _MANY_LINES and all(line.count(",") == commas for line in lines)
            for lines in inside
        )

    def _swallowing(self, first_line: int, line: int) -> InputError:
        return InputError(
            f"{self.name}, line {first_line + 1}: a quote opens in this row, and what follows up "
            f"to line {line} would be one value: close it, or take a stray quote away (what is "
            "meant so can be read from jsonl or parquet)"
        )

    def _spans(
        self, start: Position
    ) -> Iterator[tuple[Position, tuple[list[str], str | None], Position]]:
        begin = start if start.offset else self._first
        for fields, problem, end in self._records(begin):
            yield begin, (fields, problem), end
            begin = end

    def rows(self, columns: Sequence[str], start: Position = START) -> Iterator[Row]:  # noqa: D102
        header = self.columns or ()
        for begin, (fields, problem), _ in self._spans(start):
            if problem is None and len(fields) != len(header):
                problem = f"expected {len(header)} values, got {len(fields)}"
            values = {} if problem else dict(zip(header, fields, strict=True))
            yield Row(begin.row, f"row {begin.row}", values, problem)


def _is_number(value: str) -> bool:
    try:
        float(value or "0")
    except ValueError:
        return False
    return True
