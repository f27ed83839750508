"""The files of a job: parts, what is known of each, and what is published at the end.

A part is a parquet file of its own, written once and never changed. Its record, in _parts/, is
written after it: a part without a record is not there. Everything else is made from the records.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from gen_fast.durable import file_sha256, replacing, sync, write_whole
from gen_fast.embeddingfiles import EmbeddingMetadata
from gen_fast.errors import JobError
from gen_fast.jobs.corpus import PartRows
from gen_fast.jobs.plan import Part, Plan
from gen_fast.precision import to_float32, to_precision

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"
SUCCESS = "_SUCCESS"
_RECORDS = "_parts"
# What a search reads to score one row.
_GROUP_ROWS = 512


@dataclass(frozen=True)
class Record:
    """What is known of a finished part. rejected: the rows that it leaves out, as JSON objects."""

    part: int
    key: str
    rows: int
    bytes: int
    sha256: str
    truncated: int
    rejected: tuple[Mapping[str, Any], ...]


class PartStore:
    """The parts of a job in its directory."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan

    def path(self, part: Part) -> Path:
        """Of a part's file."""
        return self.folder / f"part-{part.number:05d}.parquet"

    def _record_path(self, part: Part) -> Path:
        return self.folder / _RECORDS / f"part-{part.number:05d}.json"

    def write(self, read: PartRows, embeddings: np.ndarray, truncated: int) -> Record:
        """Write a part with the embeddings [n, d] float32 of its n rows, then its record."""
        part = read.part
        values, scales = to_precision(embeddings, self.plan.settings.precision)
        columns = {
            "id": pa.array(read.ids, pa.large_string()),
            "row": pa.array(read.rows, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(values.ravel()), values.shape[1]
            ),
        }
        if scales is not None:
            columns["scale"] = pa.array(scales, pa.float32())
        metadata = {"gen_fast": json.dumps(asdict(self._metadata()), sort_keys=True)}
        target = self.path(part)
        for left in self.folder.glob(f".{target.name}.*.tmp"):  # by a process that was killed
            left.unlink()
        with replacing(target) as temporary:
            pyarrow.parquet.write_table(
                pa.table(columns, metadata=metadata),
                temporary,
                use_dictionary=False,
                compression="none",  # floats do not shrink
                row_group_size=_GROUP_ROWS,
                write_page_checksum=True,
            )
            size, digest = temporary.stat().st_size, file_sha256(temporary)
        rejected = tuple(asdict(rejection) for rejection in read.rejected)
        record = Record(
            part.number, self.plan.key(part), len(read.ids), size, digest, truncated, rejected
        )
        path = self._record_path(part)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(asdict(record), ensure_ascii=False) + "\n")
        return record

    def record(self, part: Part) -> Record | None:
        """What is known of a part; None if it has still to be made."""
        record = self._recorded(part)
        try:
            size = self.path(part).stat().st_size
        except FileNotFoundError:
            return None
        return record if record is not None and record.bytes == size else None

    def _recorded(self, part: Part) -> Record | None:
        """What was written of a part, whatever has become of its file."""
        try:
            values = json.loads(self._record_path(part).read_text(encoding="utf-8"))
            record = Record(**{**values, "rejected": tuple(values["rejected"])})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # damaged: the part is made again
        return record if record.key == self.plan.key(part) else None

    def damage(self, record: Record) -> str | None:
        """What is wrong with a finished part's file, by its checksum."""
        path = self.path(self.plan.parts[record.part])
        try:
            return (
                None if file_sha256(path) == record.sha256 else f"{path} does not have its sha256"
            )
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"

    def remove(self, part: Part) -> None:
        """Forget a part, so that it is made again."""
        self._record_path(part).unlink(missing_ok=True)

    def finished(self) -> Iterator[Record]:
        """The records of the parts that are there, in their order."""
        for part in self.plan.parts:
            record = self.record(part)
            if record is not None:
                yield record

    def remove_damaged(self) -> list[str]:
        """Check every finished part against its checksum; forget those that fail, and say why."""
        found = []
        with ThreadPoolExecutor(4) as pool:  # hashing leaves Python alone
            recorded = [self._recorded(part) for part in self.plan.parts]
            records = [record for record in recorded if record is not None]
            for record, problem in zip(records, pool.map(self.damage, records), strict=True):
                if problem is not None:
                    self.remove(self.plan.parts[record.part])
                    found.append(problem)
        return found

    def is_published(self) -> bool:
        """True if no part is missing and the files that say so are whole."""
        try:
            whole = self.manifest()["rejected_sha256"] == file_sha256(self.folder / REJECTED)
        except (JobError, OSError, KeyError):
            return False
        return whole and sum(1 for _ in self.finished()) == len(self.plan.parts)

    def unpublish(self) -> None:
        """Take back what says that the job is finished."""
        for name in (SUCCESS, MANIFEST):
            (self.folder / name).unlink(missing_ok=True)

    def publish(self) -> dict[str, Any]:
        """Write rejected.jsonl, manifest.json and _SUCCESS; return the manifest.

        Raises JobError if a part is missing.
        """
        records = list(self.finished())
        missing = len(self.plan.parts) - len(records)
        if missing:
            raise JobError(f"{self.folder}: {missing} of {len(self.plan.parts)} parts are missing")
        kinds = Counter(row["kind"] for record in records for row in record.rejected)
        with (
            replacing(self.folder / REJECTED) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            for record in records:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in record.rejected)
        parts = [
            {
                "file": self.path(self.plan.parts[record.part]).name,
                "rows": record.rows,
                "rejected": len(record.rejected),
                "bytes": record.bytes,
                "sha256": record.sha256,
            }
            for record in records
        ]
        manifest = {
            "format": "gen_fast.jobs.manifest/1",
            "rows": sum(record.rows for record in records),
            "rejected": sum(kinds.values()),
            "rejected_by_kind": dict(sorted(kinds.items())),
            "truncated": sum(record.truncated for record in records),
            "dimension": self.plan.settings.dimension,
            "precision": self.plan.settings.precision,
            "rejected_sha256": file_sha256(self.folder / REJECTED),
            "parts": parts,
        }
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (self.folder / SUCCESS).touch()
        sync(self.folder)
        return manifest

    def manifest(self) -> dict[str, Any]:
        """The manifest of a finished job. Raises JobError if the job is not finished."""
        path = self.folder / MANIFEST
        if not (self.folder / SUCCESS).exists() or not path.exists():
            raise JobError(f"{self.folder}: this job is not finished (no {SUCCESS})")
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise JobError(f"{path} is damaged: {error}") from error
        return manifest

    def ids(self, part: Part) -> tuple[list[str], np.ndarray]:
        """The ids of a part and its rows [n] int64, numbered over the job."""
        table = pyarrow.parquet.read_table(self.path(part), columns=["id", "row"])
        return table["id"].to_pylist(), table["row"].to_numpy()

    def stored(self, part: Part) -> tuple[np.ndarray, np.ndarray | None]:
        """A part's embeddings [n, ·] as they are stored, and the scales [n] of int8.

        Raises JobError if they are not what the plan says.
        """
        path = self.path(part)
        try:
            return _stored(pyarrow.parquet.read_table(path, page_checksum_verification=True))
        except (OSError, pa.ArrowException, KeyError, AttributeError) as error:
            raise JobError(f"{path} cannot be read: {error}") from error

    def embeddings(self, part: Part) -> np.ndarray:
        """A part's embeddings [n, d] as float32."""
        settings = self.plan.settings
        return to_float32(*self.stored(part), settings.precision, settings.dimension)

    def some_embeddings(self, part: Part, rows: np.ndarray) -> np.ndarray:
        """The embeddings [m, d] float32 of the job's rows [m], which this part holds."""
        settings = self.plan.settings
        wanted, back = np.unique(rows, return_inverse=True)
        values = np.empty((len(wanted), settings.dimension), np.float32)
        with pyarrow.parquet.ParquetFile(self.path(part)) as file:
            numbers = file.read(["row"])["row"].to_numpy()
            at = np.searchsorted(numbers, wanted)
            for group in np.unique(at // _GROUP_ROWS):
                table = file.read_row_group(int(group))
                floats = to_float32(*_stored(table), settings.precision, settings.dimension)
                mine = at // _GROUP_ROWS == group
                values[mine] = floats[at[mine] % _GROUP_ROWS]
        return values[back]

    def _metadata(self) -> EmbeddingMetadata:
        settings = self.plan.settings
        return EmbeddingMetadata(
            model=settings.model,
            method=settings.identity["method"],
            prompt=settings.prompt,
            normalized=settings.normalize,
            dimension=settings.dimension,
            model_dimension=int(settings.identity["dimension"]),
            dtype=settings.dtype,
            backbone=settings.backbone or "",
            fingerprint=settings.identity["backbone"],
        )


def _stored(table: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Embeddings as they are stored, and scales, of a part or some of its row groups."""
    column = table["embedding"].combine_chunks()
    values = np.asarray(column.flatten()).reshape(len(column), column.type.list_size)
    return values, table["scale"].to_numpy() if "scale" in table.column_names else None
