"""Append-only jsonl files that survive being killed, and rows that were turned away."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gen_fast.errors import InputError
from gen_fast.io.durable import write_whole

logger = logging.getLogger(__name__)


class RecordFile:
    """A jsonl file that grows by whole batches. What is in it when it is opened is kept.

    settings: what the rows depend on; kept in `<name>.settings.json` beside the file, and compared
    when the file is opened again. Raises InputError if they differ, or if the file is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._check_settings(json.loads(json.dumps(settings)))
        cut_torn_line(path)
        self.rows = read_records(path)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows and wait until they are on the disk."""
        fresh = [dict(row) for row in rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += fresh

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.path.with_name(f"{self.path.name}.settings.json")
        if not path.exists() or not self.path.exists():
            write_whole(path, json.dumps(settings, indent=2) + "\n")
            return
        kept = json.loads(path.read_text())
        for key in sorted({*kept, *settings}):
            if kept.get(key) != settings.get(key):
                raise InputError(
                    f"{self.path} was begun with {key} = {kept.get(key)!r}, now it is "
                    f"{settings.get(key)!r}: give another --out, or delete it"
                )


def cut_torn_line(path: Path) -> None:
    """Remove the last line of a file if a crash kept it from being written to its end."""
    content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    if end < len(content):
        logger.warning("%s: the last line was cut off by a crash and is made again", path)
        with path.open("r+b") as file:
            file.truncate(end)


def placed_records(path: Path) -> list[tuple[str, Any]]:
    """The values of a jsonl file with their places, "FILE, line 3". Empty lines are passed over.

    Raises InputError naming the file, or the line that is not JSON.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                records.append((f"{path}, line {number}", json.loads(line)))
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not valid JSON: {error}") from error
    return records


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file; empty if there is no file. Raises InputError."""
    return [row for _, row in placed_records(path)] if path.exists() else []


def stops(stopped: int, total: int) -> str:
    """How many of `total` answers stopped by themselves, in words."""
    share = stopped / max(1, total)
    return (
        f"{total:,} answers: {share:.1%} stopped by themselves, {1 - share:.1%} were cut at the "
        "limit of tokens"
    )


def log_stops(place: Path, stopped: int, total: int) -> None:
    """Log `stops` of the answers in `place`: a warning if any was cut."""
    level = logging.INFO if stopped == total else logging.WARNING
    logger.log(level, "%s: %s", place, stops(stopped, total))


class Rejections:
    """Rows that were left out, counted by reason and listed in a jsonl file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self._rows: list[dict[str, str]] = []

    def add(self, identifier: str, reason: str) -> None:
        """Leave out the row called `identifier`."""
        self.counts[reason] += 1
        self._rows.append({"id": identifier, "reason": reason})

    def write(self) -> None:
        """Write the list, if there is anything in it, and log the counts."""
        if not self._rows:
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, text)
        counts = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        logger.warning("%d rows left out (%s): see %s", len(self._rows), counts, self.path)
