"""Indexes over jobs: every kind, against exact search; growing, interrupted, damaged, moved."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import options, write_corpus
from typer.testing import CliRunner

import gen_fast
from gen_fast.cli import app
from gen_fast.errors import JobError
from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Plan
from gen_fast.search.build import build_index, choose_kind
from gen_fast.search.choices import KINDS, Kind
from gen_fast.search.corpus import open_index
from gen_fast.search.exact import nearest
from gen_fast.search.index import IndexInfo, info_path, read_index

ROWS = 3000
QUERIES = ["text number 17 text number 17 ", "title", "number 250"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("job")
    corpus = write_corpus(folder / "corpus.jsonl", ROWS)
    embed_corpus(corpus, folder / "out", **options(tiny_model, rows_per_part=500))
    return folder / "out"


@pytest.fixture(scope="module")
def exact(job: Path, tiny_model: Path) -> list[list[tuple[str, str]]]:
    """The ten nearest (id, text) of QUERIES."""
    store = PartStore(job, Plan.load(job))
    ids = [i for part in store.plan.parts for i in store.ids(part)[0]]
    vectors = np.concatenate([store.embeddings(part) for part in store.plan.parts])
    queries = gen_fast.load(tiny_model, dtype="float32", device="cpu").encode_query(QUERIES)
    lines = (job.parent / "corpus.jsonl").read_text().splitlines()
    texts = {row["key"]: row["text"] for row in map(json.loads, lines) if row["key"] in ids}
    assert isinstance(queries, np.ndarray)
    return [[(ids[i], texts[ids[i]]) for i in found] for found in nearest(vectors, queries, 10)[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_what_exact_search_finds(
    job: Path, tmp_path: Path, exact: list[list[tuple[str, str]]], kind: str
) -> None:
    path = tmp_path / "corpus.faiss"
    info = build_index(job, path, kind=next(k for k in KINDS if k == kind), recall_queries=50)
    assert info.recall is not None
    # A bit for each of 48 dimensions says little; the other kinds must do what is promised.
    assert info.recall >= (1.0 if kind == "flat" else 0.6 if kind == "binary" else 0.95)
    assert info.rows == PartStore(job, Plan.load(job)).manifest()["rows"]
    found = open_index(path, device="cpu").search(QUERIES, k=10)
    for hits, expected in zip(found, exact, strict=True):
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        agreed = {(hit.id, hit.text) for hit in hits} & set(expected)
        assert len(agreed) >= (10 if kind == "flat" else 4 if kind == "binary" else 8), kind
    # Nothing is left to do, and what was found out is kept.
    before = path.stat().st_mtime_ns
    assert build_index(job, path, recall_queries=0) == info
    assert path.stat().st_mtime_ns == before


def test_new_parts_are_added_to_an_index(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_corpus(folder / "a.jsonl", 400)
    settings = options(tiny_model, rows_per_part=64)
    embed_corpus(folder, tmp_path / "out", **settings)
    for kind in ("flat", "ivfpq", "ondisk"):
        build_index(tmp_path / "out", tmp_path / kind, kind=kind, recall_queries=0)
    write_corpus(folder / "b.jsonl", 300, first=400)
    embed_corpus(folder, tmp_path / "out", **settings, append=True)
    with pytest.raises(JobError, match=r"holds 392 of the 686 embeddings .*gen-fast index"):
        open_index(tmp_path / "flat")
    for kind in ("flat", "ivfpq", "ondisk"):
        info = build_index(tmp_path / "out", tmp_path / kind, recall_queries=30)
        assert (info.kind, info.rows) == (kind, 686)
        assert info.recall is not None
        assert info.recall >= 0.95
        hit = open_index(tmp_path / kind, device="cpu").search("text number 650 ", k=5)[0]
        assert any(match.id.startswith("k6") for match in hit)


@pytest.mark.parametrize("kind", ["ivfpq", "ondisk"])
def test_compressed_indexes_of_few_rows_train_at_once(
    job: Path, tmp_path: Path, kind: Kind, capfd: pytest.CaptureFixture[str]
) -> None:
    """Polysemous codes would take most of the time, and nothing searches by them."""
    import faiss

    info = build_index(job, tmp_path / "index", kind=kind, recall_queries=0)
    index = read_index(tmp_path / "index", info)
    assert not faiss.downcast_index(faiss.extract_index_ivf(index)).do_polysemous_training
    assert "WARNING clustering" not in capfd.readouterr().err


def test_an_interrupted_build_goes_on(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a save after every part, killed behind the third: the others are added, once."""
    import gen_fast.search.build as module

    path = tmp_path / "corpus.faiss"
    monkeypatch.setattr(module, "_SAVE_SECONDS", 0.0)
    add = module._Builder._add

    def dying(self: module._Builder, index: object, number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt
        add(self, index, number)

    monkeypatch.setattr(module._Builder, "_add", dying)
    with pytest.raises(KeyboardInterrupt):
        build_index(job, path, kind="int8")
    monkeypatch.setattr(module._Builder, "_add", add)
    rows = [entry["rows"] for entry in PartStore(job, Plan.load(job)).manifest()["parts"]]
    assert read_index(path, IndexInfo.load(path)).ntotal == sum(rows[:3])
    info = build_index(job, path, recall_queries=50)
    assert read_index(path, info).ntotal == sum(rows)
    assert info.recall is not None
    assert info.recall >= 0.95


@pytest.mark.parametrize(("kind", "stops"), [("int8", (1, 2, 3, 4)), ("ondisk", (3,))])
def test_a_build_that_stops_at_any_save_goes_on(
    job: Path,
    tmp_path: Path,
    kind: Kind,
    stops: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What describes the index is written before and after it: no moment makes it another's."""
    save = IndexInfo.save
    build_index(job, tmp_path / "whole", kind=kind, recall_queries=0)
    saves: list[Path] = []

    def stopping(self: IndexInfo, path: Path) -> None:
        saves.append(path)
        if len(saves) == stop:
            raise KeyboardInterrupt
        save(self, path)

    for stop in stops:
        path = tmp_path / f"index{stop}"
        saves.clear()
        monkeypatch.setattr(IndexInfo, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            build_index(job, path, kind=kind, recall_queries=0)
        monkeypatch.setattr(IndexInfo, "save", save)
        left = path.with_name(f".{path.name}.0.tmp")  # of a process that was killed
        left.write_bytes(b"half")
        build_index(job, path, kind=kind, recall_queries=0)
        assert not left.exists()
        whole, mended = open_index(tmp_path / "whole"), open_index(path)
        queries = np.eye(whole.info.dimension, dtype=np.float32)[:5]
        np.testing.assert_array_equal(mended.nearest(queries)[1], whole.nearest(queries)[1])


def test_stored_precisions_are_searched(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 600)
    for precision in ("float16", "int8", "ubinary"):
        out = tmp_path / precision
        embed_corpus(corpus, out, **options(tiny_model, precision=precision, rows_per_part=100))
        info = build_index(out, tmp_path / f"{precision}.faiss", recall_queries=50)
        assert info.kind == ("binary" if precision == "ubinary" else "flat")
        hits = open_index(tmp_path / f"{precision}.faiss", device="cpu").search("text", k=700)[0]
        assert len(hits) == info.rows


def test_the_kind_is_chosen_by_rows_and_memory() -> None:
    gigabyte = 10**9
    for rows, memory, kind in [
        (1000, gigabyte, "flat"),
        (1000, 120_000, "ivfpq"),
        (10**6, 4 * gigabyte, "hnsw"),
        (10**6, gigabyte, "ivfpq"),
        (10**8, 64 * gigabyte, "ivfpq"),
        (10**9, 64 * gigabyte, "ondisk"),
    ]:
        chosen, reason = choose_kind(rows, 384, memory)
        assert chosen == kind, (rows, memory, reason)
        assert "GB" in reason or "MB" in reason
    assert choose_kind(1000, 384, gigabyte, bits=True)[0] == "binary"


def test_moved_damaged_and_foreign(
    job: Path, tmp_path: Path, tiny_model: Path, exact: list[list[tuple[str, str]]]
) -> None:
    path = tmp_path / "corpus.faiss"
    build_index(job, path, recall_queries=0)
    moved = tmp_path / "moved"
    shutil.copytree(job, moved)
    hits = open_index(path, folder=moved, device="cpu").search(QUERIES[0])[0]
    assert {hit.id for hit in hits} == {identifier for identifier, _ in exact[0]}

    other = write_corpus(tmp_path / "other.jsonl", 50)
    embed_corpus(other, tmp_path / "other", **options(tiny_model, prompt="other: "))
    with pytest.raises(JobError, match="not an index of the job"):
        open_index(path, folder=tmp_path / "other")
    with pytest.raises(JobError, match="index of another job"):
        build_index(tmp_path / "other", path)
    # The same settings and as many rows, but other texts.
    changed = tmp_path / "changed.jsonl"
    changed.write_text((job.parent / "corpus.jsonl").read_text().replace("number 9", "number 8"))
    embed_corpus(changed, tmp_path / "changed", **options(tiny_model, rows_per_part=500))
    with pytest.raises(JobError, match="index of another job"):
        build_index(tmp_path / "changed", path)
    with pytest.raises(JobError, match="not an index of the job"):
        open_index(path, folder=tmp_path / "changed")
    with pytest.raises(JobError, match="FAISS cannot index"):
        build_index(tmp_path / "other", tmp_path / "small.faiss", kind="ivfpq")
    with pytest.raises(JobError, match="is of kind flat, not hnsw"):
        build_index(job, path, kind="hnsw")
    with pytest.raises(JobError, match="no such index"):
        open_index(tmp_path / "none")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(JobError, match="cannot be read"):
        open_index(path)
    info_path(path).write_text("{}")
    with pytest.raises(JobError, match="format"):
        open_index(path)
    (moved / "_SUCCESS").unlink()
    with pytest.raises(JobError, match="not finished"):
        build_index(moved, tmp_path / "new.faiss")


def test_the_commands(job: Path, tmp_path: Path, exact: list[list[tuple[str, str]]]) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    path = tmp_path / "corpus.faiss"
    run("index", job, "--out", path, "--memory", "1GB", "--quiet")
    lines = run("search", path, QUERIES[0], "-k", 3, "--device", "cpu").splitlines()
    assert [line.split("\t")[1] for line in lines] == [i for i, _ in exact[0][:3]]
    (tmp_path / "queries.txt").write_text("".join(f"{text}\n" for text in QUERIES))
    out = run("search", path, "--queries", tmp_path / "queries.txt", "--json", "--device", "cpu")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["query"] for record in records] == QUERIES
    assert [(h["id"], h["text"]) for h in records[2]["results"]] == exact[2]
    assert run("verify", job) == ""
    wrong = CliRunner().invoke(app, ["index", str(job), "--out", str(path), "--memory", "much"])
    assert wrong.exit_code == 2
