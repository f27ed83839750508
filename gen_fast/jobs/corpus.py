"""The rows of a part: their ids and texts, and those that are turned away."""

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from gen_fast.errors import ConfigError, InputError
from gen_fast.jobs.plan import Part, Plan, Settings, open_input
from gen_fast.rowfiles import Row, RowFile
from gen_fast.textfiles import checked_columns, id_problem, only_column, text_problem


@dataclass(frozen=True)
class Rejection:
    """A row that is not embedded. row: in its input; kind: of the reason, for counting."""

    input: str
    row: int
    place: str
    id: str | None
    kind: str
    reason: str


@dataclass
class PartRows:
    """The rows of a part that are embedded, and the others. rows: numbered over the whole job."""

    part: Part
    rows: list[int] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


class CorpusReader:
    """Reads the parts of a plan. Those of a compressed file are cheapest in their order."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._settings = plan.settings
        self._input = -1
        self._columns: _Columns | None = None
        self._file: RowFile | None = None
        # The rows behind those that were read last, and the number of the first of them.
        self._stream: Iterator[Row] = iter(())
        self._next = 0

    def read(self, part: Part) -> PartRows:
        """The rows of a part. Raises InputError if its input cannot be read any more."""
        found = PartRows(part)
        duplicates = set(part.duplicates)
        for index, row in enumerate(self._rows(part)):
            self._sort_in(row, part.first + index, index in duplicates, found)
        count = len(found.rows) + len(found.rejected)
        if count != part.rows:
            path = self._plan.inputs[part.input].path
            raise InputError(
                f"{path}: {count} rows from row {part.start.row} on, where the plan has {part.rows}"
            )
        return found

    def _rows(self, part: Part) -> Iterator[Row]:
        source = self._plan.inputs[part.input].path
        if part.input != self._input:
            self._file = open_input(source, self._settings)
            self._columns = _Columns(self._file, self._settings)
            self._input, self._next = part.input, -1
        assert self._file is not None
        assert self._columns is not None
        ahead = part.start.row - self._next
        if self._next < 0 or ahead < 0 or (ahead and self._file.seekable):
            self._stream = self._file.rows(self._columns.read, part.start)
        else:
            next(islice(self._stream, ahead, ahead), None)
        self._next = part.start.row + part.rows
        return islice(self._stream, part.rows)

    def _sort_in(self, row: Row, number: int, duplicate: bool, found: PartRows) -> None:
        """Take a row in, or find what is wrong with it."""
        assert self._columns is not None
        identifier = None
        try:
            if row.problem is not None:
                raise _RejectedError("unreadable", row.problem)
            identifier = self._id(row, number)
            if duplicate:
                raise _RejectedError("duplicate id", "an earlier row has this id")
            text = self._columns.text(row.values)
            _check_content(text, self._settings.max_text_bytes)
        except _RejectedError as error:
            path = self._plan.inputs[found.part.input].path
            found.rejected.append(
                Rejection(path, row.number, row.place, identifier, error.kind, error.reason)
            )
        else:
            found.rows.append(number)
            found.ids.append(identifier)
            found.texts.append(text)

    def _id(self, row: Row, number: int) -> str:
        if self._settings.id_column is None:
            return str(number)
        value = row.values.get(self._settings.id_column)
        problem = id_problem(value)
        if problem is not None:
            raise _RejectedError("missing id" if value is None else "bad id", problem)
        return str(value)


class _RejectedError(Exception):
    """A row is not embedded."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason


class _Columns:
    """Which columns of a file make the text."""

    def __init__(self, file: RowFile, settings: Settings) -> None:
        self._template = None if settings.template is None else parse_template(settings.template)
        if self._template is not None:
            names = [name for _, name in self._template if name is not None]
            if file.columns is not None:
                for name in [*names, *filter(None, [settings.id_column])]:
                    if name not in file.columns:
                        raise InputError(
                            f"{file.name}: no column {name!r}; there are {', '.join(file.columns)}"
                        )
        else:
            names = [self._text_column(file, settings)]
        self._names = names
        self.read = [*names, *filter(None, [settings.id_column])]

    @staticmethod
    def _text_column(file: RowFile, settings: Settings) -> str:
        column = checked_columns(file, settings.text_column, settings.id_column)
        if column is not None:
            return column
        for row in file.rows(()):
            if row.problem is None:
                strings = [name for name, value in row.values.items() if isinstance(value, str)]
                return only_column(
                    f"{file.name}, {row.place}", list(row.values), strings, settings.id_column
                )
        return "text"

    def text(self, values: Mapping[str, Any]) -> str:
        """The text of a row. Raises _RejectedError."""
        for name in self._names:
            if name not in values:
                raise _RejectedError("missing text", f"no column {name!r}")
        if self._template is None:
            text = values[self._names[0]]
        else:
            text = "".join(
                literal if name is None else literal + _written(name, values[name])
                for literal, name in self._template
            )
        problem = text_problem(text)
        if problem is not None:
            raise _RejectedError("unreadable" if isinstance(text, str) else "no string", problem)
        return str(text)


def _written(name: str, value: object) -> str:
    """A value as it stands in a template."""
    if not isinstance(value, str | int | float):
        got = "null" if value is None else type(value).__name__
        raise _RejectedError("no string", f"column {name!r} holds {got}")
    return str(value)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split "{title}\\n{text}" into (literal, column behind it or None). Raises ConfigError."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}") from error
    for _, name, form, conversion in pieces:
        # Only names: attributes, indices and formats have no meaning for a column.
        if name is not None and (not name or form or conversion or set(name) & set(".[]")):
            raise ConfigError(f"template {template!r}: {{{name}}} is not the name of a column")
    if all(name is None for _, name, _, _ in pieces):
        raise ConfigError(f"template {template!r} names no column")
    return [(literal, name) for literal, name, _, _ in pieces]


def _check_content(text: str, max_bytes: int) -> None:
    """Raise _RejectedError for a text that means nothing, or is too long to be one."""
    if not text.strip():
        raise _RejectedError("empty", "there is nothing to embed")
    if "\0" in text:
        raise _RejectedError("NUL character", f"at character {text.index(chr(0))}")
    size = len(text) if text.isascii() else len(text.encode())
    if size > max_bytes:
        raise _RejectedError("too long", f"{size} bytes, {max_bytes} are allowed")
