"""The files that a job's inputs name."""

import glob
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from gen_fast.errors import InputError
from gen_fast.io.line_files import COMPRESSIONS
from gen_fast.io.row_files import SUFFIXES
from gen_fast.io.tables import DATASETS
from gen_fast.jobs.claims import CLAIMS

PLAN = "plan.json"

# Called with the number of new rows found; 0 while other work of planning goes on.
OnRows = Callable[[int], object]


def list_sources(
    sources: Sequence[str | Path], folder: Path, on_rows: OnRows = lambda rows: None
) -> list[str]:
    """The files that files, directories and glob patterns name, as absolute paths.

    Of a directory, the files below it whose suffix is one of a format, by name; names that begin
    with "." or "_" are passed over. So is, also for a pattern, what lies in the job's own `folder`,
    or in another job below the directory. Raises InputError if nothing is found or named twice.
    """
    own = folder.resolve()
    paths: list[str] = []
    for source in map(str, sources):
        if source.startswith(DATASETS):
            paths.append(source)
            continue
        pattern = any(letter in source for letter in "*?[") and not Path(source).exists()
        if not pattern and not Path(source).is_dir():
            paths.append(str(Path(source).resolve()))
            continue
        root = _fixed_part(source) if pattern else Path(source)
        below = glob.iglob(source, recursive=True) if pattern else root.rglob("*")
        jobs: dict[Path, bool] = {}
        files = []
        for path in map(Path, below):
            on_rows(0)
            is_input = path.is_file() if pattern else _is_input(path.relative_to(root), path)
            if is_input and own not in path.resolve().parents and not _of_a_job(path, root, jobs):
                files.append(path)
        if not files:
            what = "has such a name" if pattern else f"of {', '.join(SUFFIXES)} in this directory"
            raise InputError(f"{source}: no file {what} (not counting those of jobs)")
        paths += [str(path.resolve()) for path in sorted(files)]
    for name, count in Counter(paths).items():
        if count > 1:
            raise InputError(f"{name} is given twice")
    return paths


def _fixed_part(pattern: str) -> Path:
    """The directory that all files of a glob pattern lie below."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if any(letter in part for letter in "*?["))
    return Path(*parts[:fixed])


def _of_a_job(path: Path, root: Path, known: dict[Path, bool]) -> bool:
    """Whether a directory between `root` and `path` holds a job; `known` remembers."""
    for parent in path.parents:
        if parent == root:
            return False
        if parent not in known:
            known[parent] = (parent / PLAN).is_file() and (parent / CLAIMS).is_file()
        if known[parent]:
            return True
    return False


def _is_input(name: Path, path: Path) -> bool:
    """Whether a file that has this name below a given directory is one of its inputs."""
    hidden = any(part[0] in "._" for part in name.parts)
    kind = Path(path.stem).suffix if path.suffix.lower() in COMPRESSIONS else path.suffix
    return not hidden and kind.lower() in SUFFIXES and path.is_file()
