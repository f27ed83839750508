"""The files of a job: parts, what is known of each, and what is published at the end.

A part is a parquet file of its own, written once and never changed. Its record, in _parts/, is
written after it: a part without a record is not there. Everything else is made from the records.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from gen_fast.errors import JobError
from gen_fast.io.durable import file_sha256, replacing, sync, write_whole
from gen_fast.io.embedding_files import EmbeddingMetadata
from gen_fast.io.json_files import parse_json, read_json_object, seal
from gen_fast.io.precision import to_float32, to_precision
from gen_fast.jobs.claims import Claims
from gen_fast.jobs.corpus import PartRows
from gen_fast.jobs.plan import MANIFEST, SUCCESS, Part, Plan

REJECTED = "rejected.jsonl"
_RECORDS = "_parts"
_PART_NAME = re.compile(r"part-\d{5,}\.parquet")
# What a search reads to score one row.
_GROUP_ROWS = 512


@dataclass(frozen=True)
class Record:
    """What is known of a finished part.

    rejected: how many rows it leaves out, by kind; rejected_sha256: of the list of them.
    """

    part: int
    key: str
    rows: int
    bytes: int
    sha256: str
    truncated: int
    rejected: Mapping[str, int]
    rejected_sha256: str

    @property
    def all_rows(self) -> int:
        """Embedded or not."""
        return self.rows + sum(self.rejected.values())


class PartStore:
    """The parts of a job in its directory.

    heartbeat: called while records and parts are read, also by other threads. footers: what
    `footer` said of each part; with them a part is read only if its footer is still that one. Pages
    have checksums of their own, so that a few rows can be trusted without reading all of a part.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        heartbeat: Callable[[], object] = lambda: None,
        *,
        footers: Sequence[str] | None = None,
    ) -> None:
        self.folder = folder
        self.plan = plan
        self._heartbeat = heartbeat
        self._footers = footers

    def path(self, part: Part) -> Path:
        """Of a part's file."""
        return self.folder / f"part-{part.number:05d}.parquet"

    def _record_path(self, part: Part) -> Path:
        return self.folder / _RECORDS / f"part-{part.number:05d}.json"

    def _rejected_path(self, part: Part) -> Path:
        return self.folder / _RECORDS / f"part-{part.number:05d}.rejected.jsonl"

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
        path = self._record_path(part)
        path.parent.mkdir(exist_ok=True)
        rows = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in read.rejected)
        write_whole(self._rejected_path(part), rows)
        listed = file_sha256(self._rejected_path(part))
        kinds = dict(sorted(Counter(row.kind for row in read.rejected).items()))
        record = Record(
            part=part.number,
            key=self.plan.key(part),
            rows=len(read.ids),
            bytes=size,
            sha256=digest,
            truncated=truncated,
            rejected=kinds,
            rejected_sha256=listed,
        )
        write_whole(path, _sealed(asdict(record)))
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
        self._heartbeat()
        try:
            text = self._record_path(part).read_text(encoding="utf-8")
            record = Record(**parse_json(text)["record"])
            if text != _sealed(asdict(record)):
                return None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # damaged: the part is made again
        has_rejections = self._rejected_path(part).exists()
        return record if has_rejections and record.key == self.plan.key(part) else None

    def damage(self, record: Record) -> str | None:
        """What is wrong with a finished part's file, by its checksum."""
        part = self.plan.parts[record.part]
        for path, expected in (
            (self.path(part), record.sha256),
            (self._rejected_path(part), record.rejected_sha256),
        ):
            try:
                if file_sha256(path, lambda _: self._heartbeat()) != expected:
                    return f"{path} does not have its sha256"
            except OSError as error:
                return f"{path} cannot be read: {error.strerror}"
        return None

    def footer(self, part: Part) -> str:
        """A hash of the footer of a part's file, which says where what is in it.

        Raises JobError if the part is missing, or is not as it was written.
        """
        record = self.record(part)
        damage = f"{self.path(part)} is missing" if record is None else self.damage(record)
        if damage is not None:
            raise JobError(f"{damage}: embed with the same arguments makes it again")
        return _footer_hash(self.path(part))

    def remove(self, part: Part) -> None:
        """Forget a part, so that it is made again."""
        self._record_path(part).unlink(missing_ok=True)

    def finished(self) -> Iterator[Record]:
        """The records of the parts that are there, in their order."""
        for part in self.plan.parts:
            record = self.record(part)
            if record is not None:
                yield record

    def remove_damaged(self, shown: bool = False) -> list[str]:
        """Check every finished part against its checksum; forget those that fail, and say why."""
        problems = []
        recorded = (self._recorded(part) for part in self.plan.parts)
        records = [record for record in recorded if record is not None]
        with ThreadPoolExecutor(4) as pool:  # hashing leaves Python alone
            damages = pool.map(self.damage, records)
            bar = tqdm(damages, "checking", len(records), unit="part", disable=not shown)
            for record, problem in zip(records, bar, strict=True):
                if problem is not None:
                    self.remove(self.plan.parts[record.part])
                    problems.append(problem)
        return problems

    def remove_temporaries(self, claims: Claims) -> None:
        """Remove what processes that were killed have left. To be called by who is planning."""
        for path in [*self.folder.glob(".*.tmp"), *(self.folder / _RECORDS).glob(".*.tmp")]:
            part = re.match(r"\.part-(\d+)\.", path.name)
            if part is None:
                path.unlink()
            elif claims.take(int(part[1])):  # nobody works on it
                path.unlink(missing_ok=True)
                claims.release(int(part[1]))
        for path in self.folder.glob(".ids.*"):
            shutil.rmtree(path)

    def strays(self) -> list[Path]:
        """Files that have the name of a part, and are none of the plan's."""
        planned = {self.path(part) for part in self.plan.parts}
        named = (path for path in self.folder.iterdir() if _PART_NAME.fullmatch(path.name))
        return sorted(path for path in named if path not in planned)

    def is_published(self) -> bool:
        """True if no part is missing, and manifest and rejected.jsonl are those of the parts."""
        try:
            self.checked_manifest()
        except (JobError, OSError):
            return False
        return True

    def _every_record(self) -> list[Record]:
        """A record of each part. Raises JobError if one is missing."""
        records = list(self.finished())
        missing = len(self.plan.parts) - len(records)
        if missing:
            raise JobError(f"{self.folder}: {missing} of {len(self.plan.parts)} parts are missing")
        return records

    def _entry(self, record: Record) -> dict[str, Any]:
        """What the manifest says of a part."""
        return {
            "file": self.path(self.plan.parts[record.part]).name,
            "rows": record.rows,
            "rejected": sum(record.rejected.values()),
            "bytes": record.bytes,
            "sha256": record.sha256,
        }

    def publish(self) -> dict[str, Any]:
        """Write rejected.jsonl, manifest.json and _SUCCESS; return the manifest.

        Raises JobError if a part is missing.
        """
        self._every_record()
        with replacing(self.folder / REJECTED) as temporary, temporary.open("wb") as file:
            for part in self.plan.parts:
                file.write(self._rejected_path(part).read_bytes())
        manifest = self.expected_manifest()
        write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        (self.folder / SUCCESS).touch()
        sync(self.folder)
        return manifest

    def expected_manifest(self) -> dict[str, Any]:
        """What the manifest of these parts, and of rejected.jsonl, has to say.

        Raises JobError if a part is missing, OSError if rejected.jsonl cannot be read.
        """
        records = self._every_record()
        kinds: Counter[str] = Counter()
        for record in records:
            kinds.update(record.rejected)
        return {
            "format": "gen_fast.jobs.manifest/1",
            "rows": sum(record.rows for record in records),
            "rejected": sum(kinds.values()),
            "rejected_by_kind": dict(sorted(kinds.items())),
            "truncated": sum(record.truncated for record in records),
            "dimension": self.plan.settings.dimension,
            "precision": self.plan.settings.precision,
            "rejected_sha256": file_sha256(self.folder / REJECTED),
            "parts": [self._entry(record) for record in records],
        }

    def manifest(self) -> dict[str, Any]:
        """The manifest of a finished job. Raises JobError if the job is not finished."""
        path = self.folder / MANIFEST
        for name in (SUCCESS, MANIFEST):
            if not (self.folder / name).exists():
                raise JobError(f"{self.folder}: this job is not finished (no {name})")
        try:
            manifest = read_json_object(path)
            for entry in (manifest, *manifest["parts"]):
                if not isinstance(entry["rows"], int):
                    raise ValueError(f"rows {entry['rows']!r} is not a number")
            for text in (manifest["rejected_sha256"], *(e["sha256"] for e in manifest["parts"])):
                if not isinstance(text, str):
                    raise ValueError(f"{text!r} is not a sha256")
        except (ValueError, LookupError, TypeError) as error:
            raise JobError(
                f"{path} is damaged ({error}): embed with the same arguments mends it"
            ) from error
        return manifest

    def checked_manifest(self) -> dict[str, Any]:
        """The manifest of a finished job, compared with the records of its parts.

        Raises JobError if the job is not finished, or the manifest is not that of the parts.
        """
        manifest = self.manifest()
        try:
            agrees = manifest == self.expected_manifest()
        except OSError as error:
            raise JobError(f"{self.folder / REJECTED} cannot be read: {error.strerror}") from error
        if not agrees:
            raise JobError(
                f"{self.folder / MANIFEST} is not that of the parts: embed with the same arguments "
                "mends it"
            )
        return manifest

    def ids(self, part: Part) -> tuple[list[str], np.ndarray]:
        """The ids of a part and its rows [n] int64, numbered over the job. Raises JobError."""
        with self._opened(part) as file:
            table = file.read(["id", "row"])
            return table["id"].to_pylist(), table["row"].to_numpy()

    def stored(self, part: Part) -> tuple[np.ndarray, np.ndarray | None]:
        """A part's embeddings [n, ·] as they are stored, and the scales [n] of int8.

        Raises JobError if they cannot be read.
        """
        with self._opened(part) as file:
            return _stored(file.read())

    def embeddings(self, part: Part) -> np.ndarray:
        """A part's embeddings [n, d] as float32. Raises JobError."""
        settings = self.plan.settings
        return to_float32(*self.stored(part), settings.precision, settings.dimension)

    def some_embeddings(self, part: Part, rows: np.ndarray) -> np.ndarray:
        """The embeddings [m, d] float32 of the job's rows [m], which this part holds."""
        settings = self.plan.settings
        unique, back = np.unique(rows, return_inverse=True)
        values = np.empty((len(unique), settings.dimension), np.float32)
        with self._opened(part) as file:
            numbers = file.read(["row"])["row"].to_numpy()
            at = np.searchsorted(numbers, unique)
            for group in np.unique(at // _GROUP_ROWS):
                table = file.read_row_group(int(group))
                floats = to_float32(*_stored(table), settings.precision, settings.dimension)
                in_group = at // _GROUP_ROWS == group
                values[in_group] = floats[at[in_group] % _GROUP_ROWS]
        return values[back]

    @contextmanager
    def _opened(self, part: Part) -> Iterator[Any]:
        """A part's parquet file, whose pages are checked as they are read."""
        path = self.path(part)
        try:
            if self._footers is not None and _footer_hash(path) != self._footers[part.number]:
                raise JobError(f"{path} has changed since it was indexed")
            with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
                yield file
        except (OSError, pa.ArrowException, LookupError, AttributeError, ValueError) as error:
            raise JobError(f"{path} cannot be read: {error}") from error

    def _metadata(self) -> EmbeddingMetadata:
        settings = self.plan.settings
        return EmbeddingMetadata(
            model=str(settings.model),
            method=settings.identity["method"],
            prompt=settings.prompt or "",
            normalized=settings.normalize_embeddings,
            dimension=settings.dimension,
            model_dimension=int(settings.identity["dimension"]),
            dtype=settings.dtype,
            backbone=str(settings.backbone or ""),
            fingerprint=settings.identity["backbone"],
        )


def _footer_hash(path: Path) -> str:
    """Of a parquet file: it ends with its footer, the footer's length in four bytes, and "PAR1"."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 8))
        file.seek(max(0, end - 8 - int.from_bytes(file.read(4), "little")))
        return hashlib.sha256(file.read()).hexdigest()[:16]


def _stored(table: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Embeddings as they are stored, and scales, of a part or some of its row groups."""
    column = table["embedding"].combine_chunks()
    values = np.asarray(column.flatten()).reshape(len(column), column.type.list_size)
    return values, table["scale"].to_numpy() if "scale" in table.column_names else None


def _sealed(record: Mapping[str, Any]) -> str:
    """A record with a checksum of itself."""
    return json.dumps({"record": record, "seal": seal(record)}) + "\n"
