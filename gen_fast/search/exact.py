"""Nearest neighbours among embeddings of a file, by cosine similarity over all of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gen_fast.embed.encoder import Encoder
from gen_fast.errors import InputError
from gen_fast.io.embedding_files import Embeddings
from gen_fast.io.vectors import unit
from gen_fast.model.fingerprint import described, differences


@dataclass(frozen=True)
class Match:
    """A row of the corpus near a query: its cosine and id, and its text where the file has it."""

    score: float
    id: str
    text: str | None


def search(
    corpus: Embeddings, queries: np.ndarray, k: int, *, center: bool = False
) -> list[list[Match]]:
    """Return the min(k, n) nearest rows of `corpus` for each of the `queries` [q, d], best first.

    center: subtract the corpus mean from both sides before the cosine.
    """
    scores, order = nearest(corpus.vectors, queries, k, center=center)
    return [
        [
            Match(float(score), corpus.ids[row], corpus.texts[row] if corpus.texts else None)
            for score, row in zip(*hits, strict=True)
        ]
        for hits in zip(scores, order, strict=True)
    ]


def nearest(
    corpus: np.ndarray, queries: np.ndarray, k: int, *, center: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and rows [q, min(k, n)] of the corpus vectors nearest to each query, best first.

    Equal scores keep the order of the corpus. A zero vector is like nothing: its cosine is 0.
    """
    if center and len(corpus):
        mean = corpus.mean(axis=0)
        corpus, queries = corpus - mean, queries - mean
    scores = unit(queries) @ unit(corpus).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def check_same_model(source: str | Path, corpus: Embeddings, encoder: Encoder) -> None:
    """Raise InputError, naming what differs, if `encoder` cannot embed queries for `corpus`.

    Compares the backbone's weights, where the file recorded them, and the number of dimensions.
    """
    metadata = corpus.metadata
    actual = encoder.backbone.fingerprint
    expected = metadata.fingerprint if metadata else {}
    found = differences(expected, actual)
    wrong = [described(found, expected, actual)] if found else []
    dimension = metadata.model_dimension if metadata else corpus.vectors.shape[1]
    if encoder.dimension != dimension:
        wrong.append(f"dimension {dimension} (file) vs {encoder.dimension} (model)")
    if wrong:
        origin = f" {metadata.model}" if metadata else " another model"
        raise InputError(
            f"{source}: made with{origin}, and {encoder.name} is not the same model: it differs "
            f"in {', '.join(wrong)}"
        )


def is_normalized(corpus: Embeddings) -> bool:
    """True if the vectors were stored at L2 norm 1: by the metadata, else by their lengths."""
    if corpus.metadata is not None:
        return corpus.metadata.normalized
    return bool(np.allclose(np.linalg.norm(corpus.vectors, axis=1), 1, atol=1e-3))
