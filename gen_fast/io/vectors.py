"""Vectors as rows of an array."""

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [..., d] float32 at L2 norm 1; a zero row stays zero, and so is like nothing."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: np.ndarray = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    return scaled.astype(np.float32, copy=False)


def centred_cosine(vectors: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Cosine [n] of rows [n, d] once the truth's mean is taken from both.

    States of a decoder share a large mean, so that plain cosine hides damage.
    """
    a, b = (rows - truth.mean(0) for rows in (vectors, truth))
    cosines: np.ndarray = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return cosines
