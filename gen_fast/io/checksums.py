"""A list of the checksums of a directory's files, kept beside them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from gen_fast.io.durable import file_sha256, write_whole
from gen_fast.io.json_files import check_seal, read_json_object, seal

CHECKSUMS = "checksums.json"


def record(folder: Path, checksums: Mapping[str, str]) -> None:
    """Put the sha256 of files, by their names in `folder`, on its list; others stay on it."""
    files = dict(sorted({**(read(folder) or {}), **checksums}.items()))
    values = {"files": files}
    text = json.dumps({**values, "seal": seal(values)}, indent=1)
    write_whole(folder / CHECKSUMS, text + "\n")


def record_all(folder: Path) -> None:
    """List every file below `folder`, for `damage` to find it whole."""
    record(folder, {name: file_sha256(folder / name) for name in files_below(folder)})


def read(folder: Path) -> dict[str, str] | None:
    """The list of a directory; None if there is none or it is damaged. Raises OSError."""
    try:
        values = read_json_object(folder / CHECKSUMS)
        check_seal(values)
    except (FileNotFoundError, ValueError):
        return None
    return dict(values["files"])


def problem(folder: Path, *names: str, sha256: Callable[[Path], str] = file_sha256) -> str | None:
    """What is wrong with these files of a directory, by its list; None if nothing is.

    Files that are not on the list were written by others, or by earlier versions: nothing is known
    of them.
    """
    if not (folder / CHECKSUMS).exists():
        return None
    try:
        listed = read(folder)
        if listed is None:
            return f"{folder / CHECKSUMS} is damaged"
        for name in names:
            if name in listed and sha256(folder / name) != listed[name]:
                return (
                    f"{folder / name} is damaged or was changed: it does not have the sha256 that "
                    f"{CHECKSUMS} says (delete that file if the change is meant)"
                )
    except OSError as error:
        return f"{folder} cannot be read: {error}"
    return None


def damage(folder: Path, sha256: Callable[[Path], str] = file_sha256) -> str | None:
    """What is wrong with a directory that `record_all` listed; None if it is as it was then."""
    try:
        listed = read(folder)
        if listed is None:
            return f"{folder} has no readable {CHECKSUMS}"
        if files_below(folder) != sorted(listed):
            return f"{folder} holds other files than it was made with"
        for name, expected in listed.items():
            if sha256(folder / name) != expected:
                return f"{folder / name} is damaged: it does not have its sha256"
    except OSError as error:
        return f"{folder} cannot be read: {error}"
    return None


def files_below(folder: Path) -> list[str]:
    """The names of all files of a directory but for its list."""
    files = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in files)
    return sorted(name for name in names if name != CHECKSUMS)
