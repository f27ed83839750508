"""Files that are there whole, or as they were, whenever the machine stops."""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gen_fast.errors import ConfigError

# A file system counts in steps of milliseconds, or of two seconds (FAT), by a clock of its own.
_SETTLED_NANOSECONDS = 3 * 10**9


@dataclass(frozen=True)
class FileState:
    """A file as it was: bytes, mtime and ctime in nanoseconds, sha256 of its content.

    No program can set a ctime, so a file that has all three times and sizes as before has not been
    edited since. changed: the ctime; None if the file was so young that an edit could give it the
    same one, which makes its content the only sign.
    """

    size: int
    modified: int
    changed: int | None
    sha256: str


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it is synced and renamed to `target`.

    The temporary file lies beside the target, its name begins with a dot and ends in .tmp, and
    after an error it is gone.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_is_new(directory: Path) -> None:
    """Raise ConfigError unless `directory` is not there, or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not an empty directory")


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Give a temporary directory to fill; on success it is synced and renamed to `target`.

    The target may be there already if it is empty. After an error the temporary one is gone.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """Give a temporary directory to fill; on success it is synced and takes the target's place.

    For one writer at a time: the temporary name is always the same, so that what a process that was
    killed has left is removed by the next. After an error the target is as it was.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            sync(path)
        sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole or, after a crash, as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def as_readable_as_others(path: Path) -> Iterator[None]:
    """While `path` is written by safetensors, whose files only their owner may read."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def file_sha256(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> str:
    """The sha256 of a file's bytes, in hexadecimal. on_bytes: called as they are read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_bytes(count)
    return digest.hexdigest()


def file_state(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> FileState:
    """Read a file for its state. Raises OSError, also if it changes while it is read."""
    size, modified, changed = signature(path)
    settled = is_settled(changed)
    digest = file_sha256(path, on_bytes)
    if signature(path) != (size, modified, changed):
        raise OSError("it changed while it was read")
    return FileState(size, modified, changed if settled else None, digest)


def has_changed(
    path: Path, before: FileState, on_bytes: Callable[[int], object] = lambda count: None
) -> bool:
    """Whether a file has other content than before. Read only if its times leave that open.

    Raises OSError.
    """
    now = signature(path)
    if now == (before.size, before.modified, before.changed):
        return False
    return now[0] != before.size or file_sha256(path, on_bytes) != before.sha256


def is_settled(changed: int) -> bool:
    """Whether an edit from now on will give a file another ctime than this, in nanoseconds."""
    return time.time_ns() - changed > _SETTLED_NANOSECONDS


def signature(path: Path) -> tuple[int, int, int]:
    """Size, mtime and ctime of a file. Raises OSError."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
