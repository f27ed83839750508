"""Rows of a file, whatever its format: where reading can begin, and what a row is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from gen_fast.errors import InputError


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


def decoded(value: bytes) -> tuple[str, str | None]:
    """Bytes as text, and what is wrong with them."""
    try:
        return value.decode("utf-8"), None
    except UnicodeDecodeError as error:
        part = value[error.start : error.end]
        return "", f"not UTF-8 at byte {error.start}: {part!r}"
