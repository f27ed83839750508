"""Files that are there whole, or as they were, whenever the machine stops."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


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


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
