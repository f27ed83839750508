"""Texts and their ids from the rows of a file: which columns they are, and what is no text.

Whatever is wrong is an InputError that names the file and the line or row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from gen_fast.errors import InputError, TextError
from gen_fast.io.row_files import open_rows
from gen_fast.io.rows import RowFile
from gen_fast.io.tables import Table, is_text
from gen_fast.io.texts import check_texts


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

    file_format: txt, jsonl, csv or parquet; None goes by the suffix, and is txt for stdin (which
    may be txt or jsonl). An empty line of a txt file is an empty text. split: of a dataset.
    text_column: None takes "text", else the only string column. id_column: strings or integers;
    None numbers the rows from 0.

    Raises InputError.
    """
    file = open_rows(source, file_format=file_format, split=split)
    text_column = checked_columns(file, text_column, id_column)
    ids: list[str] = []
    texts: list[str] = []
    for row in file.rows([c for c in (text_column, id_column) if c is not None]):
        where = f"{file.name}, {row.place}"
        if row.problem is not None:
            raise InputError(f"{where}: {row.problem}")
        if text_column is None:
            strings = [name for name, value in row.values.items() if isinstance(value, str)]
            text_column = only_column(where, list(row.values), strings, id_column)
        for column in filter(None, (text_column, id_column)):
            if column not in row.values:
                raise _missing(where, column, list(row.values))
        text, identifier = row.values[text_column], str(row.number)
        problem = text_problem(text)
        if id_column is not None:
            problem = problem or id_problem(row.values[id_column])
            identifier = str(row.values[id_column])
        if problem is not None:
            raise InputError(f"{where}: {problem}")
        texts.append(text)
        ids.append(identifier)
    return Texts(ids, texts)


def checked_columns(file: RowFile, text_column: str | None, id_column: str | None) -> str | None:
    """Return the text column, chosen if it is None, after checking both against the file.

    None if only the rows can say. Raises InputError.
    """
    if file.columns is None:
        return text_column
    if text_column is None:
        text_column = only_column(file.name, file.columns, file.text_columns(), id_column)
    for column in filter(None, (text_column, id_column)):
        if column not in file.columns:
            raise _missing(file.name, column, file.columns)
        if file.columns.count(column) > 1:
            raise InputError(f"{file.name}: there is more than one column {column!r}")
    if isinstance(file, Table):
        for column in filter(None, (text_column, id_column)):
            kind = file.column_type(column)
            fits = is_text(kind) or (column == id_column and pa.types.is_integer(kind))
            if not fits:
                wanted = "ids" if column == id_column else "strings"
                raise InputError(f"{file.name}: column {column!r} holds {kind}, not {wanted}")
    return text_column


def text_problem(value: object) -> str | None:
    """What keeps a value from being embedded, if anything."""
    if not isinstance(value, str):
        return f"expected a string as text, got {'null' if value is None else type(value).__name__}"
    try:
        check_texts([value])
    except TextError as error:  # JSON can spell a lone surrogate
        return str(error).removeprefix("row 0: ")
    return None


def id_problem(value: object) -> str | None:
    """What keeps a value from being an id, which is a string or an integer."""
    if isinstance(value, int) and not isinstance(value, bool):
        return None
    if isinstance(value, str):
        return text_problem(value)
    return f"expected a string or an integer as id, got {value!r:.60}"


def only_column(
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
