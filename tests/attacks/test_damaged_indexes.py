"""Bits flipped in an index, and in the job and the corpus below it: no other hits in silence."""

from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flipped, refusal
from tiny_corpus import options, write_corpus

from gen_fast.errors import JobError
from gen_fast.jobs.job import embed_corpus
from gen_fast.search.build import build_index
from gen_fast.search.choices import Kind
from gen_fast.search.corpus import open_index
from gen_fast.search.exact import Match

KINDS: tuple[Kind, ...] = ("flat", "int8", "ondisk")
COUNTS = pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])


def hits(path: Path) -> list[list[Match]]:
    return open_index(path, device="cpu").search(["text number 17 ", "title"], k=5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("indexed") / "corpus.jsonl", 400)


@pytest.fixture(scope="module")
def job(corpus: Path, tiny_model: Path) -> Path:
    out = corpus.with_name("out")
    embed_corpus(corpus, out, **options(tiny_model, rows_per_part=200))
    for kind in KINDS:
        build_index(out, corpus.with_name(kind), kind=kind, recall_queries=10)
    return out


def searched(path: Path) -> Callable[[], str]:
    expected = hits(path)
    return lambda: "harmless" if hits(path) == expected else "silent"


@COUNTS
@pytest.mark.parametrize("kind", KINDS)
def test_flips_in_an_index(job: Path, kind: Kind, count: int) -> None:
    path = job.with_name(kind)
    searched_again = searched(path)
    files = [path, path.with_name(f"{kind}.json"), *path.parent.glob(f"{kind}.*.lists")]

    def outcome() -> str:
        # To go on with it is refused where to search it is.
        refused = refusal(lambda: build_index(job, path, kind=kind, recall_queries=0))
        ended = refusal(lambda: hits(path))
        assert (refused is None) == (ended is None), (refused, ended)
        return searched_again()

    bugs = []
    for file in files:
        bugs += flipped(f"{file.name}, searched", file, count, outcome).bugs
    assert not bugs, "\n".join(bugs)


@COUNTS
@pytest.mark.parametrize("kind", ["flat", "int8"])
def test_flips_below_an_index(job: Path, corpus: Path, kind: Kind, count: int) -> None:
    outcome = searched(job.with_name(kind))
    bugs = []
    for file in (*sorted(job.glob("part-*")), job / "manifest.json", job / "plan.json", corpus):
        bugs += flipped(f"{file.name}, searched by {kind}", file, count, outcome).bugs
    assert not bugs, "\n".join(bugs)


@COUNTS
@pytest.mark.parametrize("kind", ["flat", "int8"])
def test_flips_in_the_footer_of_a_part(job: Path, kind: Kind, count: int) -> None:
    """It says where the rows lie, and has no checksum of its own as the pages do."""
    outcome = searched(job.with_name(kind))
    part = job / "part-00000.parquet"
    length = int.from_bytes(part.read_bytes()[-8:-4], "little")
    start = part.stat().st_size - 8 - length
    tally = flipped(f"footer of a part, searched by {kind}", part, 5 * count, outcome, start)
    assert not tally.bugs, "\n".join(tally.bugs)
    assert tally.counts["harmless"] == 0


@COUNTS
@pytest.mark.parametrize("name", ["part-00001.parquet", "_parts/part-00001.json", "manifest.json"])
def test_flips_in_what_is_indexed(job: Path, tmp_path: Path, name: str, count: int) -> None:
    build_index(job, tmp_path / "expected", kind="int8", recall_queries=0)
    expected = (tmp_path / "expected").read_bytes()

    def outcome() -> str:
        (tmp_path / "new").unlink(missing_ok=True)
        build_index(job, tmp_path / "new", kind="int8", recall_queries=0)
        return "harmless" if (tmp_path / "new").read_bytes() == expected else "silent"

    bugs = flipped(f"{name}, indexed", job / name, count, outcome).bugs
    assert not bugs, "\n".join(bugs)


@COUNTS
def test_flips_in_shards_are_healed(job: Path, tmp_path: Path, count: int) -> None:
    path = tmp_path / "index"
    build_index(job, path, kind="ondisk", recall_queries=0)
    expected = hits(path)

    def outcome() -> str:
        path.unlink()  # built again from what is there of shards
        build_index(job, path, kind="ondisk", recall_queries=0)
        return "healed" if hits(path) == expected else "silent"

    bugs = []
    for shard in sorted(tmp_path.glob("index.shards/*")):
        bugs += flipped(f"{shard.suffix} of a shard", shard, count // 2, outcome).bugs
    assert not bugs, "\n".join(bugs)


def test_the_file_of_another_index_is_refused(job: Path, tmp_path: Path) -> None:
    """Also one of the same kind and size: what it holds is not what its description says."""
    build_index(job, tmp_path / "one", kind="flat", recall_queries=0)
    build_index(job, tmp_path / "two", kind="int8", recall_queries=0)
    (tmp_path / "one").write_bytes((tmp_path / "two").read_bytes())
    with pytest.raises(JobError, match=r"one cannot be read: it is not the file that one\.json"):
        open_index(tmp_path / "one")
    with pytest.raises(JobError, match="delete it to build it again"):
        build_index(job, tmp_path / "one")
    (tmp_path / "one").unlink()
    build_index(job, tmp_path / "one", kind="flat", recall_queries=0)
    assert hits(tmp_path / "one") == hits(job.with_name("flat"))
