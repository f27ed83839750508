"""One bit of a file of embeddings is flipped: it is refused, or reads as it did."""

from pathlib import Path

import numpy as np
import pytest
from damage import flipped

from gen_fast.io.embedding_files import (
    EmbeddingMetadata,
    Embeddings,
    read_embeddings,
    write_embeddings,
)

METADATA = EmbeddingMetadata("m", "mean", "Ask: ", True, 24, 24, "float32")
MANY = pytest.param(100, marks=pytest.mark.slow)


@pytest.mark.parametrize("count", [20, MANY])
@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_of_a_file_of_embeddings(tmp_path: Path, suffix: str, count: int) -> None:
    texts = [f"text of row {i}" for i in range(30)]
    vectors = np.random.default_rng(0).normal(size=(30, 24)).astype(np.float32)
    written = Embeddings([f"k{i}" for i in range(30)], vectors, texts, METADATA)
    path = tmp_path / f"embeddings{suffix}"
    write_embeddings(path, written)

    def outcome() -> str:
        read = read_embeddings(path)
        same = (read.ids, read.texts, read.metadata) == (written.ids, texts, METADATA)
        return "harmless" if same and np.array_equal(read.vectors, vectors) else "silent"

    tally = flipped(f"embeddings{suffix}, read", path, count, outcome)
    assert not tally.bugs, tally.bugs
