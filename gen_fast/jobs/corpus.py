"""The rows of a part: their ids and texts, and those that are turned away."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from gen_fast.errors import InputError
from gen_fast.io.durable import signature
from gen_fast.io.rows import Row, RowFile, named_errors
from gen_fast.io.tables import DATASETS
from gen_fast.jobs.columns import Columns, RejectedError
from gen_fast.jobs.plan import Part, Plan, change_of, open_input

# Rows between two heartbeats, when many are passed over.
_STRIDE = 4096


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
    """Reads the parts of a plan. Those of a compressed file are cheapest in their order.

    heartbeat: called now and then while rows are passed over.
    """

    def __init__(self, plan: Plan, heartbeat: Callable[[], object] = lambda: None) -> None:
        self._plan = plan
        self._heartbeat = heartbeat
        self._input = -1
        self._file: RowFile | None = None
        self._columns: Columns | None = None
        # The rows behind those that were read last, and the number of the first of them.
        self._stream: Iterator[Row] = iter(())
        self._next = -1
        # Of an input that is as it was planned: its size and times.
        self._unchanged: tuple[int, tuple[int, int, int]] | None = None

    def read(self, part: Part, no_tokens: Collection[int] = ()) -> PartRows:
        """The rows of a part; those whose number over the job is in `no_tokens` are rejected.

        Raises InputError if its input cannot be read any more, or has changed since it was planned.
        """
        self._check_input(part.input)
        rows_of_part = PartRows(part)
        duplicates = set(part.duplicates)
        for index, row in enumerate(self._rows(part)):
            self._sort_in(row, part.first + index, index in duplicates, no_tokens, rows_of_part)
        count = len(rows_of_part.rows) + len(rows_of_part.rejected)
        if count != part.rows:
            path = self._plan.inputs[part.input].path
            raise InputError(
                f"{path}: {count} rows from row {part.start.row} on, where the plan has {part.rows}"
            )
        self._check_input(part.input)
        return rows_of_part

    def _check_input(self, number: int) -> None:
        """Raise InputError if an input is not the one of the plan: before and after it is read."""
        file = self._plan.inputs[number]
        if file.path.startswith(DATASETS):
            return  # its fingerprint was compared when the job began
        with named_errors(file.path):
            present = number, signature(Path(file.path))
        if present == self._unchanged:
            return
        change = change_of(file, self._plan.settings, self._heartbeat)
        if change is not None:
            raise InputError(change)
        self._unchanged = present

    def _rows(self, part: Part) -> Iterator[Row]:
        if part.input != self._input:
            self._file = open_input(self._plan.inputs[part.input].path, self._plan.settings)
            self._file.heartbeat = self._heartbeat
            self._columns = Columns(self._file, self._plan.settings)
            self._input, self._next = part.input, -1
        assert self._file is not None
        assert self._columns is not None
        ahead = part.start.row - self._next
        if self._next < 0 or ahead < 0 or (ahead and self._file.seekable):
            self._stream = self._file.rows(self._columns.read, part.start)
        else:
            for start in range(0, ahead, _STRIDE):
                count = min(_STRIDE, ahead - start)
                next(islice(self._stream, count, count), None)
                self._heartbeat()
        self._next = part.start.row + part.rows
        return islice(self._stream, part.rows)

    def _sort_in(
        self,
        row: Row,
        number: int,
        duplicate: bool,
        no_tokens: Collection[int],
        found: PartRows,
    ) -> None:
        """Take a row in, or find what is wrong with it."""
        assert self._columns is not None
        identifier = None
        try:
            identifier = self._columns.id(row, number)
            if duplicate:
                raise RejectedError("duplicate id", "an earlier row has this id")
            text = self._columns.text(row.values)
            if number in no_tokens:
                raise RejectedError("no token", "the method has no token of its own to pool")
        except RejectedError as error:
            path = self._plan.inputs[found.part.input].path
            found.rejected.append(
                Rejection(path, row.number, row.place, identifier, error.kind, error.reason)
            )
        else:
            found.rows.append(number)
            found.ids.append(identifier)
            found.texts.append(text)
