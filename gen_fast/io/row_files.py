"""Rows of txt, jsonl, csv and parquet files and of Hub datasets: one by one, from any row on.

A row that cannot be read comes with the reason, and the rows after it still come. What is wrong
with a whole file is an InputError.
"""

import csv
import io
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from gen_fast.errors import InputError
from gen_fast.io.choices import TextFormat

STDIN = "-"
DATASETS = "datasets:"
SUFFIXES: Mapping[str, TextFormat] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
# Of txt, jsonl and csv files, behind the suffix that names the format.
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

_CHUNK_BYTES = 1 << 20
# A longer line is no row: it is passed over without being held, and said.
_LINE_BYTES = 1 << 25
_BATCH_ROWS = 1024
_SAMPLE_ROWS = 100


class Position(NamedTuple):
    """Where in a file reading can begin: before row `row`, at byte `offset` (of a line file,
    decompressed), `line` lines behind its start.
    """

    row: int = 0
    offset: int = 0
    line: int = 0


START = Position()


@dataclass(frozen=True, slots=True)
class Row:
    """A row by its column names, or the `problem` that keeps it from being read.

    number: in its file, from 0. place: for messages: "line 3" (txt, jsonl: counted from 1, as
    editors do) or "row 2" (csv, parquet: `number`).
    """

    number: int
    place: str
    values: Mapping[str, Any]
    problem: str | None = None


class RowFile(ABC):
    """A file of rows. `name` is for messages.

    columns: None if every row has its own. seekable: reading from a Position costs no more than
    from the start. heartbeat: called now and then while what stands before a Position is skipped.
    """

    columns: tuple[str, ...] | None = None
    seekable = True

    def __init__(self, source: str | Path, name: str) -> None:
        self.source = source
        self.name = name
        self.heartbeat: Callable[[], object] = lambda: None

    def text_columns(self) -> tuple[str, ...]:
        """The columns that hold strings."""
        return self.columns or ()

    @abstractmethod
    def rows(self, columns: Sequence[str], start: Position = START) -> Iterator[Row]:
        """Yield the rows from `start` on, with at least these columns of those that exist."""

    @abstractmethod
    def positions(self, every: int) -> Iterator[Position]:
        """Yield where rows 0, every, 2 · every, … begin, and last the end of the file."""


def open_rows(
    source: str | Path, *, file_format: str | None = None, split: str = "train"
) -> RowFile:
    """Open a file of rows, stdin if `source` is "-", or the Hub dataset of "datasets:NAME".

    file_format: txt, jsonl, csv or parquet; None goes by the suffix, and is txt for stdin (which
    may be txt or jsonl). split: of a dataset.

    Raises InputError if the file cannot be opened or its header cannot be read.
    """
    name = "stdin" if str(source) == STDIN else str(source)
    if str(source).startswith(DATASETS) and file_format is None:
        return _Dataset(source, name, split)
    file_format = file_format or format_of(source)
    if name == "stdin" and file_format not in ("txt", "jsonl"):
        raise InputError(f"stdin: {file_format} cannot be read from stdin, only txt and jsonl")
    if file_format not in _FORMATS:
        raise InputError(f"{name}: format {file_format!r} is not one of {', '.join(_FORMATS)}")
    return _FORMATS[file_format](source, name)


def format_of(source: str | Path) -> str:
    """The format that a file's suffix names. Raises InputError."""
    if str(source) == STDIN:
        return "txt"
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise InputError(
            f"{source}: the suffix {suffixes[-1] if suffixes else ''!r} names no format; there are "
            f"{', '.join(SUFFIXES)} (or give the format)"
        )
    return SUFFIXES[suffixes[-1]]


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Turn what the operating system or pyarrow says about a file into an InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except (OSError, EOFError) as error:  # EOFError: a gzip file that was cut off
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: cannot be read: {reason}") from error
    except pa.ArrowException as error:
        raise InputError(f"{name}: {error}") from error


class _TooLong(NamedTuple):
    """In place of a line that was not held: the double quotes in it."""

    quotes: int


def _decoded(value: bytes | _TooLong) -> tuple[str, str | None]:
    """The text of a line, and what is wrong with it."""
    if isinstance(value, _TooLong):
        return "", f"a line of more than {_LINE_BYTES} bytes"
    try:
        return value.decode("utf-8"), None
    except UnicodeDecodeError as error:
        part = value[error.start : error.end]
        return "", f"not UTF-8 at byte {error.start}: {part!r}"


# ---------------------------------------------------------------------- files of lines


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


_BOM = b"\xef\xbb\xbf"  # what some editors put first


class _Txt(_LineFile):
    """A text a line, in the column "text". An empty line is an empty text."""

    columns = ("text",)

    def _spans(self, start: Position) -> Iterator[tuple[Position, bytes | _TooLong, Position]]:
        return self._numbered_lines(start)

    def rows(self, columns: Sequence[str], start: Position = START) -> Iterator[Row]:
        for begin, line, _ in self._spans(start):
            text, problem = _decoded(line)
            yield Row(begin.row, f"line {begin.line + 1}", {"text": text}, problem)


class _Jsonl(_LineFile):
    """An object a line; empty lines are no rows."""

    def _spans(self, start: Position) -> Iterator[tuple[Position, bytes | _TooLong, Position]]:
        skipped = 0
        for begin, line, end in self._numbered_lines(start):
            if isinstance(line, _TooLong) or line.strip():
                row = begin.row - skipped
                yield begin._replace(row=row), line, end._replace(row=row + 1)
            else:
                skipped += 1

    def rows(self, columns: Sequence[str], start: Position = START) -> Iterator[Row]:
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


class _Csv(_LineFile):
    """Comma-separated values under a header; every value is text; empty lines are no rows."""

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
        damage: str | None = None

        with self._lines(start) as stream:

            def feed() -> Iterator[str]:
                nonlocal offset, line, damage
                for content, size in self._bounded_lines(stream, offset):
                    offset, line = offset + size, line + 1
                    text, problem = _decoded(content)
                    damage = damage or problem
                    if isinstance(content, _TooLong):
                        # It opens or closes a field if its quotes do: one before anything else
                        # opens a field, and ends the record as damaged where one is open.
                        yield '"' * (content.quotes % 2) + "?\n"
                    else:
                        yield text if problem is None else content.decode("utf-8", "replace")

            reader = csv.reader(feed(), strict=True)
            while True:
                damage = None
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    fields, damage = [""], damage or f"not valid CSV: {error}"
                if fields:
                    row += 1
                    yield fields, damage, Position(row, offset, line)

    def _spans(
        self, start: Position
    ) -> Iterator[tuple[Position, tuple[list[str], str | None], Position]]:
        begin = start if start.offset else self._first
        for fields, problem, end in self._records(begin):
            yield begin, (fields, problem), end
            begin = end

    def rows(self, columns: Sequence[str], start: Position = START) -> Iterator[Row]:
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


# ---------------------------------------------------------------------- tables of Arrow


class Table(RowFile):
    """Columns of Arrow types."""

    def _read_schema(self, schema: Any) -> None:
        self._schema = schema
        self.columns = tuple(schema.names)

    def text_columns(self) -> tuple[str, ...]:
        """The columns that hold strings."""
        return tuple(field.name for field in self._schema if is_text(field.type))

    @abstractmethod
    def _batches(self, columns: list[str], row: int) -> Iterator[Any]:
        """Record batches of these columns from a row on."""

    @property
    @abstractmethod
    def _count(self) -> int:
        """How many rows there are."""

    def positions(self, every: int) -> Iterator[Position]:  # noqa: D102
        for row in range(0, self._count, every):
            yield Position(row)
        yield Position(self._count)

    def rows(self, columns: Sequence[str], start: Position = START) -> Iterator[Row]:  # noqa: D102
        wanted = [name for name in dict.fromkeys(columns) if name in self._schema.names]
        for name in wanted:
            if self._schema.names.count(name) > 1:
                raise InputError(f"{self.name}: there is more than one column {name!r}")
        number = start.row
        with named_errors(self.name):
            for batch in self._batches(wanted, start.row):
                lists = [_values(batch.column(name)) for name in wanted]
                for row in zip(*lists, strict=True):
                    values, problem = {}, None
                    for name, value in zip(wanted, row, strict=True):
                        if isinstance(value, bytes):
                            value, wrong = _decoded(value)
                            problem = problem or wrong
                        values[name] = value
                    yield Row(number, f"row {number}", values, problem)
                    number += 1

    def column_type(self, name: str) -> Any:
        """The Arrow type of a column."""
        return self._schema.field(name).type


def is_text(kind: Any) -> bool:
    """True for Arrow's types of strings, also behind a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _values(column: Any) -> list[Any]:
    """Python values; those of string columns as bytes, which may not be UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


class _Parquet(Table):
    def __init__(self, source: str | Path, name: str) -> None:
        super().__init__(source, name)
        with named_errors(name), self._open() as file:
            self._read_schema(file.schema_arrow)
            groups = range(file.metadata.num_row_groups)
            self._group_rows = [file.metadata.row_group(i).num_rows for i in groups]

    def _open(self) -> Any:
        # A buffer, so that a column chunk of any size is read page by page.
        return pyarrow.parquet.ParquetFile(self.source, buffer_size=_CHUNK_BYTES, pre_buffer=False)

    @property
    def _count(self) -> int:
        return sum(self._group_rows)

    def _batches(self, columns: list[str], row: int) -> Iterator[Any]:
        first = 0
        while first < len(self._group_rows) and row >= self._group_rows[first]:
            row -= self._group_rows[first]
            first += 1
        groups = list(range(first, len(self._group_rows)))
        with self._open() as file:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns):
                if row < len(batch):
                    yield batch.slice(row)
                row = max(0, row - len(batch))


class _Dataset(Table):
    """A split of a dataset, as the package `datasets` loads it."""

    def __init__(self, source: str | Path, name: str, split: str) -> None:
        super().__init__(source, name)
        try:
            import datasets
        except ImportError as error:
            raise InputError(f"{name}: needs the package datasets: pip install datasets") from error
        path = str(source).removeprefix(DATASETS)
        try:
            loaded = datasets.load_dataset(path, split=split)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"{name}, split {split}: {error}") from error
        self._table = loaded.data.table
        self.fingerprint: str = loaded._fingerprint
        self._read_schema(self._table.schema)

    @property
    def _count(self) -> int:
        count: int = self._table.num_rows
        return count

    def _batches(self, columns: list[str], row: int) -> Iterator[Any]:
        part = self._table.select(columns).slice(row)
        yield from part.to_batches(max_chunksize=_BATCH_ROWS)


_FORMATS: Mapping[str, type[RowFile]] = {
    "txt": _Txt,
    "jsonl": _Jsonl,
    "csv": _Csv,
    "parquet": _Parquet,
}
