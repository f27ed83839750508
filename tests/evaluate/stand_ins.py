"""A model whose vectors are known, and tasks small enough to score by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class KnownVectors:
    """Embeds each text as the vector that is written down for it. `seen` has texts as asked for."""

    similarity_fn_name = "cosine"
    max_seq_length = 77

    def __init__(self, vectors: Mapping[str, Sequence[float]]) -> None:
        self.vectors = vectors
        self.prompts: dict[str, str] = {}
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.lengths: set[int] = set()

    def __repr__(self) -> str:
        return f"known vectors of {sorted(self.vectors)}"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        options.pop("show_progress_bar")
        self.seen += [(text, options) for text in texts]
        self.lengths.add(self.max_seq_length)
        return np.array([self.vectors[text] for text in texts], dtype=np.float32)


def angle(degrees: float, length: float = 1.0) -> list[float]:
    """A vector in the plane."""
    radians = np.deg2rad(degrees)
    return [length * float(np.cos(radians)), length * float(np.sin(radians))]
