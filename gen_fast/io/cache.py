"""The user's cache: what was computed of a file, until the file changes, and what was measured."""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gen_fast.errors import CacheError
from gen_fast.io.checksums import damage, record_all
from gen_fast.io.durable import (
    file_sha256,
    is_settled,
    new_directory,
    signature,
    write_whole,
)
from gen_fast.io.json_files import check_seal, read_json_object, seal

logger = logging.getLogger(__name__)


def cache_directory() -> Path:
    """Where converted models are kept: $GEN_FAST_CACHE, or gen_fast below the user's cache."""
    directory = os.environ.get("GEN_FAST_CACHE")
    if directory:
        return Path(directory)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gen_fast"


def cached_directory(key: str, write: Callable[[Path], None]) -> Path:
    """A directory of the cache that `write` fills; made if it is not there or no longer as it was.

    Beside its files lies a list of their checksums, against which they are checked each time.
    Raises CacheError if it cannot be written, and what `write` raises.
    """
    final = cache_directory() / key
    problem = damage(final, remembered_sha256)
    if problem is None:
        return final
    if final.exists():
        logger.warning("%s: it is made again", problem)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(final) as temporary:
            write(temporary)
            record_all(temporary)
            if damage(final, remembered_sha256) is not None:
                _move_away(final)
    except (OSError, SafetensorError) as error:
        # Another process may have finished the same directory first; then its copy serves.
        if damage(final, remembered_sha256) is not None:
            raise CacheError(f"{final} cannot be written: {error}") from error
    return final


def _move_away(folder: Path) -> None:
    """Make room for what replaces a directory. Who reads its files now can still do so."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
        os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)


def remembered_sha256(path: Path) -> str:
    """The sha256 of a file, read only if it is not known. Raises OSError."""
    return str(remembered(path, "sha256", lambda: file_sha256(path)))


def remembered(path: Path, name: str, compute: Callable[[], Any]) -> Any:
    """What `compute` gives for a file, as JSON has it, computed again only if the file changed.

    name: of what is computed. Raises OSError if the file cannot be read, and what `compute` raises.
    """
    path = path.resolve()
    before = list(signature(path))
    key = hashlib.sha256(f"{name}\0{path}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
    kept = cache_directory() / "remembered" / f"{key}.json"
    known = _read(kept)
    if known is not None and known.get("state") == before:
        return known["value"]
    settled = is_settled(before[-1])
    value = compute()
    if settled and list(signature(path)) == before:
        _write(kept, {"path": str(path), "state": before, "value": value})
    return value


def recalled(key: Mapping[str, Any]) -> Any:
    """The value that was last kept for such a key; None if there is none, or it is damaged."""
    known = _read(_kept(key))
    return None if known is None else known.get("value")


def keep(key: Mapping[str, Any], value: Any) -> None:
    """Keep a value, as JSON, for a key that says all that it depends on."""
    _write(_kept(key), {"key": key, "value": value})


def _kept(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_directory() / "remembered" / f"{digest}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = read_json_object(path)
        check_seal(values)
    except (OSError, ValueError):
        return None  # absent or damaged: it is computed again
    return values


def _write(path: Path, values: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({**values, "seal": seal(values)}) + "\n")
    except (OSError, ValueError) as error:
        logger.debug("%s cannot be kept, and is computed again next time: %s", path, error)
