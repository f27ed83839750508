"""What a job does, fixed before it begins: its inputs, how they are embedded, and its parts.

plan.json decides every byte of every part. It never changes but for inputs that are added behind
the ones it has.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from gen_fast.errors import InputError, JobError
from gen_fast.io.durable import FileState, file_state, has_changed, signature, write_whole
from gen_fast.io.json_files import check_seal, read_json_object, seal
from gen_fast.io.row_files import open_rows
from gen_fast.io.rows import Position, RowFile, named_errors
from gen_fast.io.tables import DATASETS
from gen_fast.jobs.columns import Columns, RejectedError
from gen_fast.jobs.duplicates import duplicate_rows
from gen_fast.jobs.settings import PlanSettings, Settings
from gen_fast.jobs.sources import PLAN, OnRows, list_sources

FORMAT = "gen_fast.jobs.plan/2"
# Written before plans had a seal.
_UNSEALED_FORMAT = "gen_fast.jobs.plan/1"
MANIFEST = "manifest.json"
SUCCESS = "_SUCCESS"
# Rows between two heartbeats.
_STRIDE = 4096


@dataclass(frozen=True)
class Input:
    """A file of the corpus, or a dataset. size to changed: see durable.FileState."""

    path: str
    rows: int
    size: int
    modified: int
    sha256: str
    changed: int | None = None

    @property
    def state(self) -> FileState:
        """The file as it was planned."""
        return FileState(self.size, self.modified, self.changed, self.sha256)


@dataclass(frozen=True)
class Part:
    """Rows `start.row` to `start.row + rows` of an input, the job's rows from `first` on.

    duplicates: those of them, counted within the part, whose id an earlier row has.
    """

    number: int
    input: int
    start: Position
    rows: int
    first: int
    duplicates: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A job's inputs, settings and parts."""

    settings: PlanSettings
    inputs: tuple[Input, ...]
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Of all inputs, rejected ones included."""
        return sum(file.rows for file in self.inputs)

    @cached_property
    def settings_hash(self) -> str:
        """Tells embeddings that can be compared from others."""
        return _hash(self.settings.as_json())

    def key(self, part: Part) -> str:
        """A hash of everything that decides the bytes of a part."""
        source = self.inputs[part.input].sha256
        rows = [*part.start, part.rows, part.first, part.duplicates]
        return _hash([self.settings_hash, source, *rows])

    def save(self, folder: Path) -> None:
        """Write plan.json."""
        parts = [[p.input, *p.start, p.rows, p.first, list(p.duplicates)] for p in self.parts]
        values = {
            "format": FORMAT,
            "settings": self.settings.as_json(),
            "inputs": [asdict(file) for file in self.inputs],
        }
        values["seal"] = seal({**values, "parts": parts})
        lines = ",\n  ".join(json.dumps(part) for part in parts)
        text = json.dumps(values, indent=2, ensure_ascii=False)
        write_whole(folder / PLAN, f'{text[:-2]},\n  "parts": [\n  {lines}\n  ]\n}}\n')

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read the plan of a job. Raises JobError."""
        path = folder / PLAN
        try:
            values = read_json_object(path)
            if values["format"] == FORMAT:
                check_seal(values)
            elif values["format"] != _UNSEALED_FORMAT:
                raise JobError(f"{path} has format {values['format']!r}, expected {FORMAT!r}")
            parts = tuple(
                Part(number, file, Position(row, offset, line), rows, first, tuple(duplicates))
                for number, (file, row, offset, line, rows, first, duplicates) in enumerate(
                    values["parts"]
                )
            )
            inputs = tuple(Input(**file) for file in values["inputs"])
            _check_rows(inputs, parts)
            return cls(PlanSettings.from_json(values["settings"]), inputs, parts)
        except FileNotFoundError as error:
            raise JobError(f"{folder} holds no job: there is no {PLAN}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise JobError(
                f"{path} is not a readable plan: {error}; put back a copy of it, or delete it and "
                "embed with the same arguments: parts that fit are kept"
            ) from error


def _check_rows(inputs: Sequence[Input], parts: Iterable[Part]) -> None:
    """Raise ValueError if the parts are not all rows of the inputs, one after the other."""
    first, rows = 0, [0] * len(inputs)
    for part in parts:
        if (part.start.row, part.first) != (rows[part.input], first):
            raise ValueError(f"part {part.number} does not begin where the one before it ends")
        rows[part.input] += part.rows
        first += part.rows
    for file, planned in zip(inputs, rows, strict=True):
        if planned != file.rows:
            raise ValueError(f"its parts hold {planned} of the {file.rows} rows of {file.path}")


def prepare(
    folder: Path,
    sources: Sequence[str | Path],
    settings: PlanSettings,
    *,
    append: bool = False,
    in_use: bool = False,
    on_rows: OnRows = lambda rows: None,
) -> Plan:
    """The plan of a job in `folder`: made and saved if there is none, else checked against it.

    append: add the sources that the plan does not have. in_use: another process works by the plan
    that is there. Raises JobError naming what differs from the plan, InputError for a source that
    cannot be read.
    """
    paths = list_sources(sources, folder, on_rows)
    plan = Plan.load(folder) if (folder / PLAN).exists() else None
    bound = in_use or any(folder.glob("part-*"))
    if plan is None or (plan.settings != settings and not bound):
        # Until there is a part, a plan binds nobody: a setting that was wrong can be mended.
        plan = _extended(Plan(settings, (), ()), paths, folder, on_rows)
        unpublish(folder)
        plan.save(folder)
        return plan
    differences = [
        f"{name} was {old!r}, now it is {new!r}"
        for name, old, new in _pairs(plan.settings.as_json(), settings.as_json())
        if old != new
    ]
    changes = (change_of(file, settings, lambda: on_rows(0)) for file in plan.inputs)
    differences += [change for change in changes if change is not None]
    known = {file.path for file in plan.inputs}
    fresh = [path for path in paths if path not in known]
    if fresh and not append:
        differences.append(f"{fresh[0]} is a new input (--append adds it)")
    missing = sorted(known - set(paths))
    if missing and not append:
        differences.append(f"{missing[0]} is an input of the plan, and is not given now")
    if differences:
        raise JobError(f"{folder / PLAN} is the plan of another job: {'; '.join(differences)}")
    if fresh:
        plan = _extended(plan, fresh, folder, on_rows)
        unpublish(folder)
        plan.save(folder)
    return plan


def unpublish(folder: Path) -> None:
    """Take back what says that a job is finished."""
    for name in (SUCCESS, MANIFEST):
        (folder / name).unlink(missing_ok=True)


def open_input(path: str, settings: Settings) -> RowFile:
    """Open an input of a job. Raises InputError."""
    return open_rows(path, file_format=settings.file_format, split=settings.split)


def _extended(plan: Plan, paths: Sequence[str], folder: Path, on_rows: OnRows) -> Plan:
    """`plan` with more inputs. Reads them once, and all inputs for their ids if they have some."""
    inputs, parts, first = list(plan.inputs), list(plan.parts), plan.rows
    settings = plan.settings
    for path in paths:
        with named_errors(path):
            began = None if path.startswith(DATASETS) else signature(Path(path))
        file = open_input(path, settings)
        Columns(file, settings)  # or an error, before the file is read
        before = first
        for start, end in pairwise(file.positions(settings.rows_per_part)):
            count = end.row - start.row
            on_rows(count)
            if count:
                parts.append(Part(len(parts), len(inputs), start, count, first))
                first += count
        inputs.append(_input(path, first - before, file, on_rows))
        if began is not None and began != signature(Path(path)):
            raise InputError(f"{path}: it changed while it was read: run again")
    if settings.id_column is not None:
        ids = _numbered_ids(inputs, settings, on_rows)
        duplicates = duplicate_rows(ids, folder, lambda: on_rows(0))
        parts = [replace(part, duplicates=_within(part, duplicates)) for part in parts]
    return Plan(settings, tuple(inputs), tuple(parts))


def _within(part: Part, rows: Any) -> tuple[int, ...]:
    low, high = rows.searchsorted([part.first, part.first + part.rows])
    return tuple(int(row) - part.first for row in rows[low:high])


def _numbered_ids(
    inputs: Iterable[Input], settings: Settings, on_rows: OnRows
) -> Iterator[tuple[int, str]]:
    """The rows of a job that have an id, with it."""
    first = 0
    for file in inputs:
        opened = open_input(file.path, settings)
        columns = Columns(opened, settings)
        for row in opened.rows([settings.id_column or ""]):
            if row.number % _STRIDE == 0:
                on_rows(0)  # they have been counted
            with suppress(RejectedError):
                yield first + row.number, columns.id(row, 0)
        first += file.rows


def _input(path: str, rows: int, file: RowFile, on_rows: OnRows) -> Input:
    if path.startswith(DATASETS):
        return Input(path, rows, 0, 0, str(getattr(file, "fingerprint", "")))
    with named_errors(path):
        state = file_state(Path(path), lambda _: on_rows(0))
    return Input(path, rows, state.size, state.modified, state.sha256, state.changed)


def change_of(
    file: Input, settings: Settings, heartbeat: Callable[[], object] = lambda: None
) -> str | None:
    """What is different about an input since the plan was made. Reads it only if it looks so.

    Raises InputError for a dataset that cannot be opened.
    """
    if file.path.startswith(DATASETS):
        opened = open_input(file.path, settings)
        changed = getattr(opened, "fingerprint", "") != file.sha256
    else:
        try:
            changed = has_changed(Path(file.path), file.state, lambda _: heartbeat())
        except OSError as error:
            return f"input {file.path} cannot be read: {error.strerror}"
    if not changed:
        return None
    return f"input {file.path} has changed since it was planned; put new rows into a new file"


def _pairs(
    old: Mapping[str, Any], new: Mapping[str, Any], name: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _pairs(a, b, f"{name}{key}.")
        else:
            yield f"{name}{key}", a, b


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
