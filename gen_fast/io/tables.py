"""Rows of parquet files and Hub datasets: columns with types."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from gen_fast.errors import InputError
from gen_fast.io.rows import START, Position, Row, RowFile, decoded, named_errors

DATASETS = "datasets:"

_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20


class Table(RowFile):
    """Columns of Arrow types."""

    def _read_schema(self, schema: Any) -> None:
        self._schema = schema
        self.columns = tuple(schema.names)

    def text_columns(self) -> tuple[str, ...]:
        """The columns that hold strings."""
        return tuple(field.name for field in self._schema if is_text(field.type))

    @abstractmethod
    def _batches(self, columns: list[str], row: int) -> Iterator[Any]:
        """Record batches of these columns from a row on."""

    @property
    @abstractmethod
    def _count(self) -> int:
        """How many rows there are."""

    def positions(self, every: int) -> Iterator[Position]:  # noqa: D102
        for row in range(0, self._count, every):
            yield Position(row)
        yield Position(self._count)

    def rows(self, columns: Sequence[str], start: Position = START) -> Iterator[Row]:  # noqa: D102
        wanted = [name for name in dict.fromkeys(columns) if name in self._schema.names]
        for name in wanted:
            if self._schema.names.count(name) > 1:
                raise InputError(f"{self.name}: there is more than one column {name!r}")
        number = start.row
        with named_errors(self.name):
            for batch in self._batches(wanted, start.row):
                lists = [_values(batch.column(name)) for name in wanted]
                for row in zip(*lists, strict=True):
                    values, problem = {}, None
                    for name, value in zip(wanted, row, strict=True):
                        if isinstance(value, bytes):
                            value, wrong = decoded(value)
                            problem = problem or wrong
                        values[name] = value
                    yield Row(number, f"row {number}", values, problem)
                    number += 1

    def column_type(self, name: str) -> Any:
        """The Arrow type of a column."""
        return self._schema.field(name).type


def is_text(kind: Any) -> bool:
    """True for Arrow's types of strings, also behind a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        check(kind)
        for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _values(column: Any) -> list[Any]:
    """Python values; those of string columns as bytes, which may not be UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        column = column.cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


class Parquet(Table):
    """A parquet file, read batch by batch."""

    def __init__(self, source: str | Path, name: str) -> None:
        super().__init__(source, name)
        with named_errors(name), self._open() as file:
            self._read_schema(file.schema_arrow)
            groups = range(file.metadata.num_row_groups)
            self._group_rows = [file.metadata.row_group(i).num_rows for i in groups]

    def _open(self) -> Any:
        # A buffer, so that a column chunk of any size is read page by page.
        return pyarrow.parquet.ParquetFile(self.source, buffer_size=_BUFFER_BYTES, pre_buffer=False)

    @property
    def _count(self) -> int:
        return sum(self._group_rows)

    def _batches(self, columns: list[str], row: int) -> Iterator[Any]:
        first = 0
        while first < len(self._group_rows) and row >= self._group_rows[first]:
            row -= self._group_rows[first]
            first += 1
        groups = list(range(first, len(self._group_rows)))
        with self._open() as file:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns):
                if row < len(batch):
                    yield batch.slice(row)
                row = max(0, row - len(batch))


class Dataset(Table):
    """A split of a dataset, as the package `datasets` loads it."""

    def __init__(self, source: str | Path, name: str, split: str) -> None:
        super().__init__(source, name)
        try:
            import datasets
        except ImportError as error:
            raise InputError(f"{name}: needs the package datasets: pip install datasets") from error
        path = str(source).removeprefix(DATASETS)
        try:
            loaded = datasets.load_dataset(path, split=split)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"{name}, split {split}: {error}") from error
        self._table = loaded.data.table
        self.fingerprint: str = loaded._fingerprint
        self._read_schema(self._table.schema)

    @property
    def _count(self) -> int:
        count: int = self._table.num_rows
        return count

    def _batches(self, columns: list[str], row: int) -> Iterator[Any]:
        part = self._table.select(columns).slice(row)
        yield from part.to_batches(max_chunksize=_BATCH_ROWS)
