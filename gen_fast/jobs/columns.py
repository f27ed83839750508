"""What of a row is its id and its text, and what keeps a row from being embedded."""

from collections.abc import Mapping
from typing import Any

from gen_fast.errors import InputError
from gen_fast.io.rows import Row, RowFile
from gen_fast.io.text_files import checked_columns, id_problem, only_column, text_problem
from gen_fast.jobs.settings import Settings, parse_template


class RejectedError(Exception):
    """A row is not embedded. kind: of the reason, for counting."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason


class Columns:
    """The columns of a file that settings ask for. `read` names those to be read.

    Raises InputError if the file does not have them, ConfigError for a template without meaning.
    """

    def __init__(self, file: RowFile, settings: Settings) -> None:
        self._id_column = settings.id_column
        self._max_bytes = settings.max_text_bytes
        self._template = None if settings.template is None else parse_template(settings.template)
        if self._template is None:
            self._names = [_text_column(file, settings)]
        else:
            self._names = [name for _, name in self._template if name is not None]
        self.read = [*self._names, *filter(None, [settings.id_column])]
        for name in self.read:
            if file.columns is not None and name not in file.columns:
                raise InputError(
                    f"{file.name}: no column {name!r}; there are {', '.join(file.columns)}"
                )

    def id(self, row: Row, number: int) -> str:
        """The id of a row, which is `number` where there is no column of ids.

        Raises RejectedError, also for a row that cannot be read.
        """
        if row.problem is not None:
            raise RejectedError("unreadable", row.problem)
        if self._id_column is None:
            return str(number)
        value = row.values.get(self._id_column)
        if value is None or value == "":  # csv has no other way to leave it out
            raise RejectedError("missing id", f"nothing in column {self._id_column!r}")
        problem = id_problem(value)
        if problem is not None:
            raise RejectedError("bad id", problem)
        return str(value)

    def text(self, values: Mapping[str, Any]) -> str:
        """The text of a row. Raises RejectedError."""
        for name in self._names:
            if name not in values:
                raise RejectedError("missing text", f"no column {name!r}")
        if self._template is None:
            text = values[self._names[0]]
        else:
            text = "".join(
                literal if name is None else literal + _written(name, values[name])
                for literal, name in self._template
            )
        problem = text_problem(text)
        if problem is not None:
            raise RejectedError("unreadable" if isinstance(text, str) else "no string", problem)
        self._check_content(text)
        return str(text)

    def _check_content(self, text: str) -> None:
        """Turn away a text that means nothing, or is too long to be one."""
        if not text.strip():
            raise RejectedError("empty", "there is nothing to embed")
        if "\0" in text:
            raise RejectedError("NUL character", f"at character {text.index(chr(0))}")
        size = len(text) if text.isascii() else len(text.encode())
        if size > self._max_bytes:
            raise RejectedError("too long", f"{size} bytes, {self._max_bytes} are allowed")


def _text_column(file: RowFile, settings: Settings) -> str:
    column = checked_columns(file, settings.text_column, settings.id_column)
    if column is not None:
        return column
    for row in file.rows(()):
        if row.problem is None:
            strings = [name for name, value in row.values.items() if isinstance(value, str)]
            where = f"{file.name}, {row.place}"
            return only_column(where, list(row.values), strings, settings.id_column)
    return "text"


def _written(name: str, value: object) -> str:
    """A value as it stands in a template."""
    if not isinstance(value, str | int | float):
        got = "null" if value is None else type(value).__name__
        raise RejectedError("no string", f"column {name!r} holds {got}")
    return str(value)
