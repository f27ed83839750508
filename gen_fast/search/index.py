"""An index on disk, and its search: FILE, what FAISS writes, and FILE.json beside it.

FILE.json says what the index was made of. Parts are added in their order, so that the number of
vectors in FILE tells which are in it.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gen_fast.errors import JobError
from gen_fast.io.cache import remembered_sha256
from gen_fast.io.durable import FileState, has_changed, write_whole
from gen_fast.io.json_files import check_seal, read_json_object, seal
from gen_fast.io.precision import sign_bits
from gen_fast.io.vectors import unit
from gen_fast.jobs.parts import PartStore
from gen_fast.search.choices import Kind

try:
    import faiss as faiss  # for build.py too, which so fails with the same words
except ImportError as error:
    raise JobError("an index needs FAISS: pip install 'gen-fast[search]'") from error

FORMAT = "gen_fast.jobs.index/2"


@dataclass(frozen=True)
class IndexInfo:
    """What an index was made of and how it is searched.

    folder: the job's, as it lay. parts, contents: how many parts, and a hash over their checksums.
    reason: why this kind. probes: inverted lists (IVF) or graph
    candidates (HNSW) a query looks at. candidates: neighbours the first pass finds for each that
    is wanted, scored again by the stored embeddings; 1 takes the scores of FAISS.
    sha256: of FILE: one, or while it is being replaced the old and the new one; none if there is
    no FILE yet. lists_name, lists: of an index on disk, the file beside it that holds its lists.
    footers: of each part, as PartStore.footer says it.
    center: of a binary index, what is subtracted before signs are taken: the mean of a sample,
    since the embeddings of a language model share a large one; empty where signs are stored.
    recall: share of the ten exact neighbours found among ten, by cosine; None if not measured.
    """

    kind: Kind
    reason: str
    folder: str
    settings: str
    parts: int
    contents: str
    dimension: int
    rows: int = 0
    probes: int = 0
    candidates: int = 1
    recall: float | None = None
    center: tuple[float, ...] = ()
    sha256: tuple[str, ...] = ()
    lists_name: str = ""
    lists: FileState | None = None
    footers: tuple[str, ...] = ()
    format: str = FORMAT

    def save(self, path: Path) -> None:
        """Write FILE.json."""
        values = asdict(self)
        text = json.dumps({**values, "seal": seal(values)}, indent=2)
        write_whole(info_path(path), text + "\n")

    @classmethod
    def load(cls, path: Path) -> "IndexInfo":
        """Read FILE.json. Raises JobError."""
        source = info_path(path)
        try:
            values = read_json_object(source)
            if values.get("format") != FORMAT:
                raise JobError(
                    f"{source} has format {values.get('format')!r}, expected {FORMAT!r}: delete "
                    f"{path} to build it again"
                )
            check_seal(values)
            del values["seal"]
            lists = values["lists"]
            return cls(
                **{
                    **values,
                    "center": tuple(values["center"]),
                    "sha256": tuple(values["sha256"]),
                    "footers": tuple(values["footers"]),
                    "lists": None if lists is None else FileState(**lists),
                }
            )
        except FileNotFoundError as error:
            raise JobError(f"{path} is no index of gen-fast: there is no {source.name}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise JobError(
                f"{source} is damaged: {error}; delete {path} to build it again"
            ) from error


def info_path(path: Path) -> Path:
    """Where FILE.json lies."""
    return path.with_name(f"{path.name}.json")


def contents_hash(entries: Sequence[Mapping[str, Any]]) -> str:
    """A hash over the checksums of parts, as the manifest lists them."""
    return hashlib.sha256("".join(entry["sha256"] for entry in entries).encode()).hexdigest()


def read_index(path: Path, info: IndexInfo) -> Any:
    """What FAISS wrote. Raises JobError if it is not what FILE.json says, or cannot be read.

    Its checksum is compared first, since FAISS trusts its files: both FILE and lists on disk, which
    may be larger than memory, are read for theirs only if it is not known since they changed.
    """
    try:
        if remembered_sha256(path) not in info.sha256:
            raise JobError(
                f"{path} cannot be read: it is not the file that {info_path(path).name} was "
                "written for (its sha256 is another); delete it to build it again"
            )
        if info.lists is not None:
            lists = path.with_name(info.lists_name)
            if has_changed(lists, info.lists):
                raise JobError(
                    f"{lists} has changed since it was written: delete {path} to build it again"
                )
        if info.kind == "binary":
            return faiss.read_index_binary(str(path))
        # Lists on disk are looked for beside the index, wherever both have been moved.
        return faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR)
    except OSError as error:
        raise JobError(f"{error.filename} cannot be read: {error.strerror}") from error
    except RuntimeError as error:
        if isinstance(error, JobError):
            raise
        raise JobError(f"{path} cannot be read: {error}") from error


def set_probes(index: Any, info: IndexInfo) -> None:
    """Make the index look at `info.probes` lists or candidates a query."""
    if info.kind in ("ivfpq", "ondisk"):
        faiss.extract_index_ivf(index).nprobe = info.probes
    elif info.kind == "hnsw":
        graph: Any = faiss.downcast_index(index.index)
        graph.hnsw.efSearch = info.probes


def centered_bits(vectors: np.ndarray, info: IndexInfo) -> np.ndarray:
    """What a binary index compares of vectors [n, d] at L2 norm 1: [n, ceil(d / 8)] uint8."""
    return sign_bits(vectors - np.array(info.center, np.float32) if info.center else vectors)


class VectorSearch:
    """The rows of a job that are nearest to vectors, by an index and the stored embeddings."""

    def __init__(self, index: Any, store: PartStore, info: IndexInfo) -> None:
        self._index = index
        self._store = store
        self._info = info
        set_probes(index, info)
        self._firsts = [part.first for part in store.plan.parts]

    def part_of(self, row: int) -> int:
        """The part that holds a row of the job."""
        return bisect_right(self._firsts, row) - 1

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines [q, m] and rows [q, m] of the m = min(k, n) nearest, best first.

        queries [q, d] float32 have L2 norm 1. Equal scores are ordered by row.
        """
        k = min(k, self._index.ntotal)
        n_candidates = min(self._index.ntotal, k * self._info.candidates)
        if self._info.kind == "binary":
            _, rows = self._index.search(centered_bits(queries, self._info), n_candidates)
        else:
            scores, rows = self._index.search(np.ascontiguousarray(queries), n_candidates)
        if self._info.candidates > 1:
            scores = self._scored(queries, rows)
        scores = np.where(rows < 0, -np.inf, scores)  # lists that hold fewer than k
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def _scored(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The cosines of candidates [q, c] by the embeddings that are stored."""
        scores = np.full(rows.shape, -np.inf, np.float32)
        parts = np.searchsorted(self._firsts, rows, side="right") - 1
        parts[rows < 0] = -1
        for number in np.unique(parts[parts >= 0]):
            at = np.nonzero(parts == number)
            vectors = self._store.some_embeddings(self._store.plan.parts[number], rows[at])
            scores[at] = np.einsum("id,id->i", queries[at[0]], unit(vectors))
        return scores
