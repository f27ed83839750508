"""Texts from txt (a text a line), jsonl, csv or parquet files, or from stdin.

Whatever is wrong with a file is an InputError that names the file and the line (txt, jsonl:
counted from 1, as editors do) or the row (csv, parquet: counted from 0 without the header, as the
default ids are).
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from gen_fast.errors import InputError, TextError
from gen_fast.tokenizing import check_texts

STDIN = "-"
DATASETS = "datasets:"
TEXT_SUFFIXES = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
# A row must fit in a block; pyarrow's own megabyte is less than a long document.
_CSV_BLOCK_BYTES = 1 << 25

# Where a value stands ("line 3", "row 2"), its id (None: number it) and its text.
_Row = tuple[str, object, object]


@dataclass(frozen=True)
class Texts:
    """n texts and their n ids, in the order of the file."""

    ids: list[str]
    texts: list[str]


def read_texts(
    source: str | Path,
    *,
    file_format: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    split: str = "train",
) -> Texts:
    """Read the texts of a file, of stdin if `source` is "-", or of a Hub dataset "datasets:NAME".

    split: of a dataset.
    file_format: txt, jsonl, csv or parquet; None goes by the suffix, and is txt for stdin (which
    may be txt or jsonl). An empty line of a txt file is an empty text.
    text_column: None takes "text", else the only string column. id_column: strings or integers;
    None numbers the rows from 0.

    Raises InputError.
    """
    name = "stdin" if str(source) == STDIN else str(source)
    file_format = file_format or _format_of(source)
    if file_format == "txt" and (text_column or id_column):
        raise InputError(f"{name}: txt has no columns, so {text_column or id_column!r} is missing")
    if name == "stdin" and file_format not in ("txt", "jsonl"):
        raise InputError(f"stdin: {file_format} cannot be read from stdin, only txt and jsonl")
    if name.startswith(DATASETS):
        source = f"{source}:{split}"
    if file_format not in _READERS:
        raise InputError(f"{name}: format {file_format!r} is not one of {', '.join(_READERS)}")
    ids: list[str] = []
    texts: list[str] = []
    with named_errors(name):
        for place, identifier, text in _READERS[file_format](source, name, text_column, id_column):
            if not isinstance(text, str):
                kind = "null" if text is None else type(text).__name__
                raise InputError(f"{name}, {place}: expected a string as text, got {kind}")
            try:
                check_texts([text])
            except TextError as error:  # JSON can spell a lone surrogate
                reason = str(error).removeprefix("row 0: ")
                raise InputError(f"{name}, {place}: {reason}") from error
            ids.append(_identifier(name, place, identifier, len(ids)))
            texts.append(text)
    return Texts(ids, texts)


def _format_of(source: str | Path) -> str:
    if str(source) == STDIN:
        return "txt"
    if str(source).startswith(DATASETS):
        return "dataset"
    suffix = Path(source).suffix.lower()
    if suffix not in TEXT_SUFFIXES:
        raise InputError(
            f"{source}: the suffix {suffix!r} names no format; there are "
            f"{', '.join(TEXT_SUFFIXES)} (or give the format)"
        )
    return TEXT_SUFFIXES[suffix]


def _identifier(name: str, place: str, value: object, number: int) -> str:
    if value is _NUMBERED:
        return str(number)
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise InputError(f"{name}, {place}: expected a string or an integer as id, got {value!r:.60}")


_NUMBERED = object()


@contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Turn what the operating system or pyarrow says about a file into an InputError."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error
    except pa.ArrowException as error:
        raise InputError(f"{name}: {error}") from error


def _lines(source: str | Path, name: str) -> Iterator[tuple[str, str]]:
    """Yield (place, line without its end). U+2028 and the like are part of a line."""
    with ExitStack() as stack:
        stream: IO[bytes] = sys.stdin.buffer  # stays open: it is not ours
        if str(source) != STDIN:
            stream = stack.enter_context(Path(source).open("rb"))
        for number, raw in enumerate(stream, 1):
            line = raw.removesuffix(b"\n").removesuffix(b"\r")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors
            yield f"line {number}", _decoded(name, f"line {number}", line)


def _decoded(name: str, place: str, value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}, {place}: not UTF-8 at byte {error.start}: {value[error.start : error.end]!r}"
        ) from error


def _read_txt(source: str | Path, name: str, _text: None, _id: None) -> Iterator[_Row]:
    for place, line in _lines(source, name):
        yield place, _NUMBERED, line


def _read_jsonl(
    source: str | Path, name: str, text_column: str | None, id_column: str | None
) -> Iterator[_Row]:
    for place, line in _lines(source, name):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # an over-long integer is a ValueError
            raise InputError(f"{name}, {place}: not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise InputError(
                f"{name}, {place}: expected a JSON object, got {type(record).__name__}"
            )
        strings = [key for key, value in record.items() if isinstance(value, str)]
        if text_column is None:
            text_column = _only_column(f"{name}, {place}", list(record), strings, id_column)
        for column in filter(None, (text_column, id_column)):
            if column not in record:
                raise _missing(f"{name}, {place}", column, list(record))
        yield place, record[id_column] if id_column else _NUMBERED, record[text_column]


def _read_csv(
    source: str | Path, name: str, text_column: str | None, id_column: str | None
) -> Iterator[_Row]:
    malformed: list[Any] = []

    def keep(row: Any) -> str:
        malformed.append(row)
        return "error"

    options: dict[str, Any] = {
        # Rows are numbered in error messages only when read by one thread.
        "read_options": pyarrow.csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK_BYTES),
        "parse_options": pyarrow.csv.ParseOptions(
            newlines_in_values=True, invalid_row_handler=keep
        ),
    }
    try:
        with pyarrow.csv.open_csv(source, **options) as reader:
            inferred = reader.schema
        text_column = _checked_columns(name, inferred, text_column, id_column)
        columns = [text_column] + ([id_column] if id_column else [])
        # Read as bytes: every value of a csv is text, and each is decoded where its row is known.
        options["convert_options"] = pyarrow.csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.binary())
        )
        with pyarrow.csv.open_csv(source, **options) as reader:
            yield from _batch_rows(name, reader, text_column, id_column)
    except pa.ArrowInvalid as error:
        if not malformed:
            raise
        row = malformed[0]
        place = "" if row.number is None else f", row {row.number - 2}"
        raise InputError(
            f"{name}{place}: expected {row.expected_columns} values, got {row.actual_columns}"
        ) from error


def _read_parquet(
    source: str | Path, name: str, text_column: str | None, id_column: str | None
) -> Iterator[_Row]:
    with pyarrow.parquet.ParquetFile(source) as file:
        text_column = _checked_columns(name, file.schema_arrow, text_column, id_column)
        kind = file.schema_arrow.field(text_column).type
        if not _is_text(kind):
            raise InputError(f"{name}: column {text_column!r} holds {kind}, not strings")
        if id_column:
            kind = file.schema_arrow.field(id_column).type
            if not _is_text(kind) and not pa.types.is_integer(kind):
                raise InputError(f"{name}: column {id_column!r} holds {kind}, not ids")
        batches = file.iter_batches(columns=[text_column] + ([id_column] if id_column else []))
        yield from _batch_rows(name, batches, text_column, id_column)


def _read_dataset(
    source: str | Path, name: str, text_column: str | None, id_column: str | None
) -> Iterator[_Row]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{name}: needs the package datasets: pip install datasets") from error
    path, split = str(source).removeprefix(DATASETS).rsplit(":", 1)
    try:
        loaded = datasets.load_dataset(path, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{name}, split {split}: {error}") from error
    table = loaded.data.table
    text_column = _checked_columns(name, table.schema, text_column, id_column)
    columns = [text_column] + ([id_column] if id_column else [])
    yield from _batch_rows(name, table.select(columns).to_batches(), text_column, id_column)


def _batch_rows(name: str, batches: Any, text_column: str, id_column: str | None) -> Iterator[_Row]:
    row = 0
    for batch in batches:
        texts = _as_bytes(batch.column(text_column))
        ids = _as_bytes(batch.column(id_column)) if id_column else [_NUMBERED] * len(texts)
        for identifier, text in zip(ids, texts, strict=True):
            place = f"row {row}"
            yield (
                place,
                _decoded(name, place, identifier) if isinstance(identifier, bytes) else identifier,
                _decoded(name, place, text) if isinstance(text, bytes) else text,
            )
            row += 1


def _as_bytes(column: Any) -> list[bytes | None]:
    """The values of a string, dictionary-of-strings, binary or integer column as bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    values: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return values


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _checked_columns(name: str, schema: Any, text_column: str | None, id_column: str | None) -> str:
    """Return the text column, chosen if it is None, after checking that both columns exist."""
    strings = [field.name for field in schema if _is_text(field.type)]
    if text_column is None:
        text_column = _only_column(name, schema.names, strings, id_column)
    for column in filter(None, (text_column, id_column)):
        if column not in schema.names:
            raise _missing(name, column, schema.names)
        if schema.names.count(column) > 1:
            raise InputError(f"{name}: there is more than one column {column!r}")
    return text_column


def _only_column(
    where: str, columns: Sequence[str], strings: Sequence[str], id_column: str | None
) -> str:
    """The column called "text", else the only one that holds strings."""
    if "text" in columns:
        return "text"
    candidates = [column for column in strings if column != id_column]
    if len(candidates) == 1:
        return candidates[0]
    raise InputError(
        f"{where}: {'several columns hold' if candidates else 'no column holds'} strings and none "
        f"is called 'text'; say which column to embed: {', '.join(columns) or 'there is none'}"
    )


def _missing(where: str, column: str, columns: Sequence[str]) -> InputError:
    return InputError(f"{where}: no column {column!r}; there are {', '.join(columns) or 'none'}")


_READERS: Mapping[str, Any] = {
    "txt": _read_txt,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
}
