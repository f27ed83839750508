"""A corpus, and the job over it that nothing happened to."""

from pathlib import Path

import pytest
from tiny_corpus import (
    ROWS,
    files_of,
    options,
    write_corpus,
)

from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.verify import verify


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", ROWS)


@pytest.fixture(scope="session")
def expected(corpus: Path, tiny_model: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run of one process."""
    out = corpus.with_name("expected")
    embed_corpus(corpus, out, **options(tiny_model))
    assert verify(out) == []
    return files_of(out)
