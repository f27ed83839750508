"""FAISS indexes over the embeddings of a finished job: chosen, trained, filled part by part.

An interrupted build goes on from the parts that the file holds, and a job that has grown has its
new parts added.
"""

import sys
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gen_fast.errors import JobError
from gen_fast.io.durable import file_sha256, file_state, replacing, sync, write_whole
from gen_fast.io.vectors import unit
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Part, Plan
from gen_fast.search.choices import Kind
from gen_fast.search.index import (
    IndexInfo,
    VectorSearch,
    centered_bits,
    contents_hash,
    faiss,
    read_index,
)

# Up to here a query may look at every vector: 307 MB at 384 dimensions.
FLAT_ROWS = 200_000
# A graph takes longer to build a row than lists do; of more rows, lists.
HNSW_ROWS = 20_000_000
_HNSW_LINKS = 32
_TRAINING_ROWS_A_LIST = 64
# What training may cost, in time and in memory.
_MOST_LISTS = 1 << 16
_TRAINING_BYTES = 4 << 30
_RECALL_QUERIES = 200
_RECALL_TARGET = 0.95
# Cosines nearer than this are rounding.
_TIE = 1e-5
_SAVE_SECONDS = 60.0
_SEED = 0


def choose_kind(
    rows: int, dimension: int, memory_bytes: int, *, bits: bool = False
) -> tuple[Kind, str]:
    """The kind of index for so many rows that fits in so much memory, and why.

    bits: the embeddings are stored as signs only.
    """

    def size(count: float) -> str:
        return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

    budget = size(memory_bytes)
    if bits:
        return "binary", f"the embeddings are bits: {size(rows * dimension / 8)}, searched exactly"
    flat = rows * dimension * 4
    if rows <= FLAT_ROWS and flat <= memory_bytes:
        return "flat", f"{rows} rows are few enough to look at all of them: exact, {size(flat)}"
    hnsw = rows * (dimension * 4 + 2 * _HNSW_LINKS * 4 + 16)
    if rows <= HNSW_ROWS and hnsw <= memory_bytes:
        return "hnsw", f"a graph over {rows} rows takes {size(hnsw)} of the {budget} there are"
    ivfpq = rows * (pq_bytes(dimension) + 8)
    if ivfpq <= memory_bytes:
        return "ivfpq", (
            f"vectors of {rows} rows take {size(flat)}, compressed {size(ivfpq)} of the {budget} "
            "there are"
        )
    return "ondisk", (
        f"even compressed, {rows} rows take {size(ivfpq)}, more than the {budget} there are: the "
        "lists stay on disk"
    )


def pq_bytes(dimension: int) -> int:
    """Bytes of a product-quantised vector: a byte for each four dimensions, or as near as fits."""
    return next(count for count in range(max(1, dimension // 4), 0, -1) if dimension % count == 0)


def build_index(
    folder: str | Path,
    out: str | Path,
    *,
    kind: Kind | None = None,
    memory_bytes: int | None = None,
    recall_queries: int = _RECALL_QUERIES,
    show_progress_bar: bool | None = None,
) -> IndexInfo:
    """Index the embeddings of a finished job; of an index that is there, what it lacks.

    kind: None chooses by the number of rows and memory_bytes (None: half of what is free).
    recall_queries: embeddings of the corpus whose exact neighbours are compared; 0 measures
    nothing. Raises JobError.
    """
    folder, out = Path(folder), Path(out)
    store = PartStore(folder, Plan.load(folder))
    entries = store.checked_manifest()["parts"]
    rows = [entry["rows"] for entry in entries]
    settings = store.plan.settings
    shown = sys.stderr.isatty() if show_progress_bar is None else show_progress_bar
    budget = _free_bytes() // 2 if memory_bytes is None else memory_bytes
    if sum(rows) == 0:
        raise JobError(f"{folder} has no embedding to index")
    previous = IndexInfo.load(out) if out.exists() else None
    if previous is not None:
        if (previous.settings, previous.contents) != (
            store.plan.settings_hash,
            contents_hash(entries[: previous.parts]),
        ):
            raise JobError(
                f"{out} is the index of another job, {previous.folder}, or of other texts"
            )
        if kind is not None and previous.kind != kind:
            raise JobError(f"{out} is of kind {previous.kind}, not {kind}")
    # Every part is checked, once, before it is added.
    footers = () if previous is None else previous.footers
    footers = (*footers, *map(store.footer, store.plan.parts[len(footers) :]))
    store = PartStore(folder, store.plan, footers=footers)
    if previous is not None:
        info = replace(previous, folder=str(folder.resolve()), rows=sum(rows))
        info = replace(info, parts=len(entries), contents=contents_hash(entries), footers=footers)
    else:
        bits = settings.precision == "ubinary"
        index_kind, reason = choose_kind(sum(rows), settings.dimension, budget, bits=bits)
        if kind is not None:
            index_kind, reason = kind, "it was asked for"
        info = IndexInfo(
            kind=index_kind,
            reason=reason,
            folder=str(folder.resolve()),
            settings=store.plan.settings_hash,
            parts=len(entries),
            contents=contents_hash(entries),
            dimension=settings.dimension,
            rows=sum(rows),
            probes={"ivfpq": 16, "ondisk": 16, "hnsw": 64}.get(index_kind, 0),
            candidates=1 if index_kind in ("flat", "hnsw") else 10,
            footers=footers,
        )
        if index_kind == "binary" and not bits:
            mean = _sample(store, rows, 1 << 14).mean(axis=0)
            info = replace(info, center=tuple(float(value) for value in mean))
    info.save(out)
    for left in [*out.parent.glob(f".{out.name}.*.tmp"), *_shards(out).glob(".*.tmp")]:
        left.unlink(missing_ok=True)  # of a build that was killed
    builder = (
        _OnDisk(store, out, info, rows)
        if info.kind == "ondisk"
        else _Builder(store, out, info, rows)
    )
    try:
        index = builder.build(shown)
        info = builder.info
        if recall_queries:
            info = _tuned(index, store, info, rows, recall_queries)
    except (RuntimeError, OSError) as error:
        if isinstance(error, JobError):
            raise
        raise JobError(f"FAISS cannot index {folder} as {info.kind}: {error}") from error
    info.save(out)
    return info


class _Builder:
    """An index in one file."""

    def __init__(self, store: PartStore, path: Path, info: IndexInfo, rows: list[int]) -> None:
        self._store = store
        self._path = path
        self.info = info
        self._rows = rows

    def build(self, shown: bool) -> Any:
        """The index with all parts in it, saved."""
        index = read_index(self._path, self.info) if self._path.exists() else self._trained()
        ends = [0, *accumulate(self._rows)]
        if index.ntotal not in ends:
            raise JobError(
                f"{self._path} holds {index.ntotal} vectors, which is no number of whole parts: "
                "delete it to begin again"
            )
        if index.ntotal == ends[-1] and self._path.exists():
            return index
        saved = time.monotonic()
        with tqdm(total=ends[-1], initial=index.ntotal, unit="vector", disable=not shown) as bar:
            for part in self._store.plan.parts[self._parts_in(index.ntotal, ends) :]:
                before = index.ntotal
                self._add(index, part.number)
                bar.update(index.ntotal - before)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._save(index)
                    saved = time.monotonic()
        self._save(index)
        return index

    @staticmethod
    def _parts_in(vectors: int, ends: list[int]) -> int:
        # Parts without a row end where the one before them does.
        return max(number for number, end in enumerate(ends) if end == vectors)

    def _add(self, index: Any, number: int) -> None:
        part = self._store.plan.parts[number]
        _, rows = self._store.ids(part)
        if len(rows) == 0:
            return
        if self.info.kind == "binary":
            index.add_with_ids(self._bits(part), rows)
        else:
            index.add_with_ids(unit(self._store.embeddings(part)), rows)

    def _bits(self, part: Part) -> np.ndarray:
        if self._store.plan.settings.precision == "ubinary":
            return self._store.stored(part)[0]
        return centered_bits(unit(self._store.embeddings(part)), self.info)

    def _save(self, index: Any) -> None:
        write = faiss.write_index_binary if self.info.kind == "binary" else faiss.write_index
        with replacing(self._path) as temporary:
            write(index, str(temporary))
            digest = file_sha256(temporary)
            # The machine may stop on either side of the renaming.
            self.info = replace(self.info, sha256=(*self.info.sha256, digest))
            self.info.save(self._path)
        self.info = replace(self.info, sha256=(digest,))
        self.info.save(self._path)

    def _trained(self) -> Any:
        dimension, rows = self.info.dimension, sum(self._rows)
        if self.info.kind == "binary":
            return faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(-(-dimension // 8) * 8))
        # As many lists as four square roots of the rows (FAISS' own advice), if they can be filled.
        lists = max(1, min(int(4 * rows**0.5), rows // 39, _MOST_LISTS))
        index = faiss.index_factory(
            dimension,
            {
                "flat": "IDMap2,Flat",
                "hnsw": f"IDMap2,HNSW{_HNSW_LINKS}",
                "int8": "IDMap2,SQ8",
                # np: without polysemous training, which takes most of the time and serves a search
                # by Hamming distance that nothing here asks for.
            }.get(self.info.kind, f"IVF{lists},PQ{pq_bytes(dimension)}np"),
            faiss.METRIC_INNER_PRODUCT,
        )
        if self.info.kind in ("ivfpq", "ondisk"):
            lists_of_codes: Any = faiss.downcast_index(faiss.extract_index_ivf(index))
            # Of few rows FAISS says so once for each four dimensions, and trains all the same.
            lists_of_codes.pq.cp.min_points_per_centroid = 1
        if not index.is_trained:
            n_training = max(_TRAINING_ROWS_A_LIST * lists, 1 << 14)
            n_training = min(n_training, _TRAINING_BYTES // (4 * dimension))
            index.train(_sample(self._store, self._rows, n_training))
        return index


class _OnDisk(_Builder):
    """Lists in a file of their own, read as they are needed; made of shards of some parts each."""

    _PARTS_A_SHARD = 64

    def build(self, shown: bool) -> Any:
        """The index with all parts in it, saved."""
        from faiss.contrib.ondisk import merge_ondisk

        if self._path.exists():
            index = read_index(self._path, self.info)
            if index.ntotal == sum(self._rows):
                return index
        folder = _shards(self._path)
        folder.mkdir(exist_ok=True)
        trained = folder / "trained.faiss"
        if not self._path.exists() or not _is_intact(trained):
            self._write(self._trained(), trained)
        entries = self._store.manifest()["parts"]
        shards = []
        for start in tqdm(
            range(0, len(entries), self._PARTS_A_SHARD), unit="shard", disable=not shown
        ):
            members = range(len(entries))[start : start + self._PARTS_A_SHARD]
            # Its name says what is in it: a last, unfilled shard is made again when parts come.
            made_of = [{"sha256": file_sha256(trained)}, *(entries[i] for i in members)]
            shard = folder / f"{members[0]:05d}-{contents_hash(made_of)[:16]}.faiss"
            if not _is_intact(shard):
                index = faiss.read_index(str(trained))
                for number in members:
                    self._add(index, number)
                self._write(index, shard)
            shards.append(str(shard))
        index = faiss.read_index(str(trained))
        # A new name: whoever searches the index that is there keeps its lists.
        lists = self._path.with_name(f"{self._path.name}.{len(entries)}.lists")
        merge_ondisk(index, shards, str(lists))
        sync(lists)
        self.info = replace(self.info, lists_name=lists.name, lists=file_state(lists))
        self._save(index)
        for old in self._path.parent.glob(f"{self._path.name}.*.lists"):
            if old != lists:
                old.unlink()
        for old in folder.glob("*-*.faiss"):
            if str(old) not in shards:
                old.unlink()
                _checksum_path(old).unlink(missing_ok=True)
        return index

    @staticmethod
    def _write(index: Any, path: Path) -> None:
        with replacing(path) as temporary:
            faiss.write_index(index, str(temporary))
        write_whole(_checksum_path(path), file_sha256(path))


def _shards(path: Path) -> Path:
    """Where the shards of an index on disk lie."""
    return path.with_name(f"{path.name}.shards")


def _checksum_path(shard: Path) -> Path:
    return shard.with_suffix(".sha256")


def _is_intact(shard: Path) -> bool:
    """Whether a shard is there as it was written; every other one is made again."""
    try:
        return file_sha256(shard).encode() == _checksum_path(shard).read_bytes()
    except FileNotFoundError:
        return False


def _sample(store: PartStore, rows: list[int], count: int) -> np.ndarray:
    """About `count` embeddings from all over the corpus, at L2 norm 1."""
    draw = np.random.default_rng(_SEED)
    share = min(1.0, count / sum(rows))
    order = draw.permutation(len(rows))
    samples: list[np.ndarray] = []
    for number in order:
        if sum(map(len, samples)) >= count:
            break
        vectors = unit(store.embeddings(store.plan.parts[number]))
        # From a large corpus, whole parts are not needed: a quarter of a hundred of them.
        samples.append(vectors[draw.random(len(vectors)) < max(share, 0.25)])
    return np.concatenate(samples)


# ---------------------------------------------------------------------- recall


def _tuned(
    index: Any, store: PartStore, info: IndexInfo, rows: list[int], queries: int
) -> IndexInfo:
    """`info` with the fewest probes that reach the recall that is wanted, and that recall."""
    vectors, own_rows = _queries(store, rows, queries)
    exact = _tenth_best(store, vectors, own_rows)
    most = faiss.extract_index_ivf(index).nlist if info.kind in ("ivfpq", "ondisk") else 1024
    while True:
        info = replace(info, recall=_recall(index, store, info, vectors, own_rows, exact))
        assert info.recall is not None
        if not info.probes or info.recall >= _RECALL_TARGET or info.probes >= most:
            return info
        info = replace(info, probes=min(most, 2 * info.probes))


def _queries(store: PartStore, rows: list[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the corpus to search with, and their rows."""
    draw = np.random.default_rng(_SEED + 1)
    number = draw.choice(len(rows), size=count, p=np.array(rows) / sum(rows))
    vectors, own_rows = [], []
    for part, share in zip(*np.unique(number, return_counts=True), strict=True):
        picked = draw.choice(rows[part], size=min(int(share), rows[part]), replace=False)
        vectors.append(unit(store.embeddings(store.plan.parts[part]))[picked])
        own_rows.append(store.ids(store.plan.parts[part])[1][picked])
    return np.concatenate(vectors), np.concatenate(own_rows)


def _tenth_best(store: PartStore, queries: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The tenth highest cosine of each query [q], its own row left out; reads all parts."""
    best: np.ndarray = np.full((len(queries), 10), -np.inf, np.float32)
    for part in store.plan.parts:
        _, numbers = store.ids(part)
        scores = queries @ unit(store.embeddings(part)).T
        scores[numbers[None, :] == own[:, None]] = -np.inf
        best = np.partition(np.concatenate([best, scores], axis=1), -10, axis=1)[:, -10:]
    tenth: np.ndarray = best.min(axis=1)
    return tenth


def _recall(
    index: Any,
    store: PartStore,
    info: IndexInfo,
    queries: np.ndarray,
    own: np.ndarray,
    tenth: np.ndarray,
) -> float:
    """Share of ten neighbours that are as near as the tenth of exact search: ties count."""
    scores, rows = VectorSearch(index, store, info).nearest(queries, 11)
    scores = np.where(rows == own[:, None], -np.inf, scores)
    n_neighbours = min(10, info.rows - 1)
    near = (scores >= np.maximum(tenth, -2)[:, None] - _TIE).sum(axis=1)
    return float(np.minimum(near, n_neighbours).mean() / max(1, n_neighbours))


def _free_bytes() -> int:
    """Memory that is free, in bytes."""
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 8 << 30
