"""Rows whose id an earlier row has, without the ids in memory."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

_BUCKETS = 256
_FLUSH_ROWS = 1 << 16
# An id by 16 bytes of its hash: among a billion ids, two share them with probability 1e-21.
_RECORD = np.dtype([("hash", "S16"), ("row", "<i8")])


def duplicate_rows(
    ids: Iterable[tuple[int, str]], folder: Path, heartbeat: Callable[[], object] = lambda: None
) -> np.ndarray:
    """The rows [m] int64, ascending, of all (row, id) but the first with each id.

    Sorts hashes of the ids in files of a temporary directory in `folder`: 24 bytes of disk a row,
    and of memory 1/256 of that. heartbeat: called now and then while it sorts.
    """
    with tempfile.TemporaryDirectory(prefix=".ids.", dir=folder) as scratch:
        _scatter(ids, Path(scratch))
        repeated = []
        for path in Path(scratch).iterdir():
            heartbeat()
            repeated.append(_repeated(path))
    return np.sort(np.concatenate([np.empty(0, np.int64), *repeated]))


def _scatter(ids: Iterable[tuple[int, str]], scratch: Path) -> None:
    """Write (hash, row) to 256 files by the first byte of the hash, in the order of the rows."""
    hashes, rows = bytearray(), []
    for row, identifier in ids:
        hashes += hashlib.blake2b(identifier.encode(), digest_size=16).digest()
        rows.append(row)
        if len(rows) == _FLUSH_ROWS:
            _append(hashes, rows, scratch)
            hashes, rows = bytearray(), []
    _append(hashes, rows, scratch)


def _append(hashes: bytearray, rows: list[int], scratch: Path) -> None:
    codes = np.frombuffer(hashes, np.uint8).reshape(-1, 16)
    records = np.empty(len(rows), _RECORD)
    # An "S16" drops trailing zero bytes, which loses nothing: all hashes have 16.
    records["hash"] = codes.view("S16").ravel()
    records["row"] = rows
    order = np.argsort(codes[:, 0], kind="stable")
    bounds = np.searchsorted(codes[order, 0], np.arange(_BUCKETS + 1))
    for bucket in np.flatnonzero(np.diff(bounds)):
        with (scratch / str(bucket)).open("ab") as file:
            file.write(records[order[bounds[bucket] : bounds[bucket + 1]]].tobytes())


def _repeated(path: Path) -> np.ndarray:
    records = np.fromfile(path, _RECORD)
    # The sort is stable: among equal hashes the first stays first.
    order = np.argsort(records["hash"], kind="stable")
    ordered = records["hash"][order]
    rows: np.ndarray = records["row"][order[1:][ordered[1:] == ordered[:-1]]]
    return rows
