"""Vectors as rows of an array."""

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [..., d] float32 at L2 norm 1; a zero row stays zero, and so is like nothing."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: np.ndarray = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    return scaled.astype(np.float32, copy=False)
