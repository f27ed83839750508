"""The files that a job's inputs name, and what of a directory is none of them."""

import errno
import glob
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gen_fast.errors import InputError
from gen_fast.io.line_files import COMPRESSIONS
from gen_fast.io.row_files import SUFFIXES
from gen_fast.io.tables import DATASETS
from gen_fast.io.texts import is_utf8
from gen_fast.jobs.claims import CLAIMS

logger = logging.getLogger(__name__)

PLAN = "plan.json"

# Called with the number of new rows found; 0 while other work of planning goes on.
OnRows = Callable[[int], object]


def list_sources(
    sources: Sequence[str | Path], folder: Path, on_rows: OnRows = lambda rows: None
) -> list[str]:
    """The files that files, directories and glob patterns name, as absolute paths.

    Of a directory, the files below it whose suffix is one of a format, by name; names that begin
    with "." or "_" are passed over. So is, also for a pattern, what lies in the job's own `folder`,
    or in another job below the directory. Links that lead nowhere, links to directories (of a
    directory: a pattern's "**" follows them), pipes and devices are left out, and a warning counts
    them.
    Raises InputError if nothing is found or named twice, or a directory cannot be read.
    """
    own = os.path.realpath(folder)
    paths: list[str] = []
    for source in map(str, sources):
        if source.startswith(DATASETS):
            paths.append(source)
            continue
        is_pattern = any(letter in source for letter in "*?[") and not Path(source).exists()
        if not is_pattern and not Path(source).is_dir():
            paths.append(os.path.realpath(source))
            continue
        left_out = _LeftOut(source)
        if is_pattern:
            named = _files_of_pattern(source, left_out, on_rows)
        else:
            named = _files_below(source, left_out, on_rows)
        files = sorted({path: os.path.realpath(path) for path in named}.items())
        inside = [real for _, real in files if not real.startswith(os.path.join(own, ""))]
        left_out.warn()
        if not inside:
            what = "has such a name" if is_pattern else f"of {', '.join(SUFFIXES)} below it"
            raise InputError(f"{source}: no file {what} (not counting those of jobs)")
        paths += inside
    for path in paths:
        if not is_utf8(path):
            raise InputError(f"{path!a}: the name is not UTF-8, and a plan could not hold it")
    for name, count in Counter(paths).items():
        if count > 1:
            raise InputError(f"{name} is given twice")
    return paths


class _LeftOut:
    """What a source names and is no input: how many of each kind, and the first of them."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._kinds: dict[str, list[str]] = {}

    def takes(self, path: Path) -> bool:
        """Count a path unless it is a regular file. Raises InputError if nobody can tell."""
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise _unreadable(error) from error
            kind = "links that lead nowhere"
        else:
            if stat.S_ISREG(mode):
                return False
            kind = "links to directories, which are not followed"
            if not stat.S_ISDIR(mode):
                kind = "pipes, sockets or devices"
        self._kinds.setdefault(kind, []).append(str(path))
        return True

    def warn(self) -> None:
        """Say of each kind how many there are."""
        for kind, paths in self._kinds.items():
            logger.warning(
                "%s: %d left out (%s), such as %s", self._source, len(paths), kind, min(paths)
            )


def _files_below(root: str, left_out: _LeftOut, on_rows: OnRows) -> Iterator[Path]:
    """The files below a directory whose names are those of inputs, but not those of jobs."""
    for parent, folders, files in os.walk(root, onerror=_refuse_folder):
        on_rows(0)
        kept = []
        for path in (Path(parent, name) for name in folders if name[0] not in "._"):
            if path.is_symlink():
                left_out.takes(path)
            elif not _is_job(path):
                kept.append(path.name)
        folders[:] = kept
        for path in (Path(parent, name) for name in files if _is_input(name)):
            on_rows(0)
            if not left_out.takes(path):
                yield path


def _refuse_folder(error: OSError) -> None:
    raise _unreadable(error) from error


def _unreadable(error: OSError) -> InputError:
    return InputError(f"{error.filename}: cannot be read: {error.strerror}")


def _files_of_pattern(pattern: str, left_out: _LeftOut, on_rows: OnRows) -> Iterator[Path]:
    """The files that a pattern matches, but not those of jobs below its fixed part."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if any(letter in part for letter in "*?["))
    root = Path(*parts[:fixed])
    # A directory that cannot be read matches nothing, and glob does not say so.
    for depth in range(fixed, len(parts)):
        for folder in glob.iglob(str(Path(*parts[:depth])), recursive=True):
            on_rows(0)
            if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
                raise InputError(f"{folder}: cannot be read: Permission denied")
    jobs: dict[Path, bool] = {}
    for path in map(Path, glob.iglob(pattern, recursive=True)):
        on_rows(0)
        if not path.is_dir() and not _of_a_job(path, root, jobs) and not left_out.takes(path):
            yield path


def _is_job(folder: Path) -> bool:
    # Not Path's own: it raises where a folder cannot be read.
    return os.path.isfile(folder / PLAN) and os.path.isfile(folder / CLAIMS)


def _of_a_job(path: Path, root: Path, known: dict[Path, bool]) -> bool:
    """Whether a directory between `root` and `path` holds a job; `known` remembers."""
    for parent in path.parents:
        if parent == root:
            return False
        if parent not in known:
            known[parent] = _is_job(parent)
        if known[parent]:
            return True
    return False


def _is_input(name: str) -> bool:
    """Whether a file below a directory has a name of an input."""
    path = Path(name)
    kind = Path(path.stem).suffix if path.suffix.lower() in COMPRESSIONS else path.suffix
    return name[0] not in "._" and kind.lower() in SUFFIXES
