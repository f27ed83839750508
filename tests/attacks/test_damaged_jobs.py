"""Bits flipped in every kind of file that a job writes: noticed, and mended or refused."""

from pathlib import Path

import pytest
from damage import flipped
from tiny_corpus import files_of, options, write_corpus

from gen_fast.errors import JobError
from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.verify import verify

FILES = (
    "plan.json",
    "part-00001.parquet",
    "_parts/part-00001.json",
    "_parts/part-00000.rejected.jsonl",
    "manifest.json",
    "rejected.jsonl",
)


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_flips(tiny_model: Path, tmp_path: Path, count: int) -> None:
    """verify notices whatever changes a result, and the same command mends it or refuses."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", 24)
    out, settings = tmp_path / "out", options(tiny_model, rows_per_part=8)
    embed_corpus(corpus, out, **settings)
    expected = files_of(out)

    def outcome() -> str:
        damaged = files_of(out) != expected
        try:
            noticed = verify(out) != []
        except JobError:
            noticed = True
        if damaged and not noticed:
            return "silent"
        embed_corpus(corpus, out, **settings)
        if files_of(out) != expected or verify(out) != []:
            return "silent"
        return "healed" if noticed else "harmless"

    bugs = []
    for name in FILES:
        bugs += flipped(f"{name}, verify and embed", out / name, count, outcome).bugs
    assert not bugs, "\n".join(bugs)
