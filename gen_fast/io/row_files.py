"""Rows of txt, jsonl, csv and parquet files and of Hub datasets: one by one, from any row on.

A row that cannot be read comes with the reason, and the rows after it still come. What is wrong
with a whole file is an InputError.
"""

from collections.abc import Mapping
from pathlib import Path

from gen_fast.errors import InputError
from gen_fast.io.choices import TextFormat
from gen_fast.io.line_files import COMPRESSIONS, STDIN, CsvFile, JsonlFile, TxtFile
from gen_fast.io.regular_files import check_regular
from gen_fast.io.rows import RowFile, named_errors
from gen_fast.io.tables import DATASETS, Dataset, Parquet

SUFFIXES: Mapping[str, TextFormat] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
_FORMATS: Mapping[str, type[RowFile]] = {
    "txt": TxtFile,
    "jsonl": JsonlFile,
    "csv": CsvFile,
    "parquet": Parquet,
}


def open_rows(
    source: str | Path, *, file_format: str | None = None, split: str = "train"
) -> RowFile:
    """Open a file of rows, stdin if `source` is "-", or the Hub dataset of "datasets:NAME".

    file_format: txt, jsonl, csv or parquet; None goes by the suffix, and is txt for stdin (which
    may be txt or jsonl). split: of a dataset.

    Raises InputError if the file cannot be opened or its header cannot be read.
    """
    name = "stdin" if str(source) == STDIN else str(source)
    if str(source).startswith(DATASETS) and file_format is None:
        return Dataset(source, name, split)
    file_format = file_format or format_of(source)
    if name == "stdin" and file_format not in ("txt", "jsonl"):
        raise InputError(f"stdin: {file_format} cannot be read from stdin, only txt and jsonl")
    if file_format not in _FORMATS:
        raise InputError(f"{name}: format {file_format!r} is not one of {', '.join(_FORMATS)}")
    if name != "stdin":
        with named_errors(name):
            check_regular(source)
    return _FORMATS[file_format](source, name)


def format_of(source: str | Path) -> str:
    """The format that a file's suffix names. Raises InputError."""
    if str(source) == STDIN:
        return "txt"
    suffixes = [suffix.lower() for suffix in Path(source).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in SUFFIXES:
        raise InputError(
            f"{source}: the suffix {suffixes[-1] if suffixes else ''!r} names no format; there are "
            f"{', '.join(SUFFIXES)} (or give the format)"
        )
    return SUFFIXES[suffixes[-1]]
