"""Embeddings in fewer bytes: half floats, int8 with a scale a row, signs as bits."""

import numpy as np

from gen_fast.io.choices import Precision


def sign_bits(embeddings: np.ndarray) -> np.ndarray:
    """The signs of [n, d] as bits, 8 dimensions a byte: [n, ceil(d / 8)] uint8."""
    return np.packbits(embeddings > 0, axis=-1)


def to_precision(
    embeddings: np.ndarray, precision: Precision
) -> tuple[np.ndarray, np.ndarray | None]:
    """Store embeddings [n, d] float32 in a precision: (values, scales).

    int8 has scales [n] float32, a row's largest magnitude / 127, so that nothing but the row
    itself decides its bytes: a row is values · scale. For the others scales are None.
    Raises OverflowError for a value that float16 cannot hold.
    """
    if precision == "float32":
        return embeddings, None
    if precision == "float16":
        if len(embeddings) and np.abs(embeddings).max() > np.finfo(np.float16).max:
            raise OverflowError("an embedding is too large for float16: store float32 or int8")
        return embeddings.astype(np.float16), None
    if precision == "int8":
        scales = np.abs(embeddings).max(axis=1, initial=0.0) / np.float32(127)
        safe = np.maximum(scales, np.finfo(np.float32).tiny)
        return np.rint(embeddings / safe[:, None]).astype(np.int8), scales.astype(np.float32)
    return sign_bits(embeddings), None


def to_float32(
    values: np.ndarray, scales: np.ndarray | None, precision: Precision, dimension: int
) -> np.ndarray:
    """Embeddings [n, dimension] float32 from what to_precision gave; bits become -1 and 1."""
    if precision == "ubinary":
        values = np.unpackbits(values, axis=-1, count=dimension)
    floats: np.ndarray = values.astype(np.float32, copy=False)
    if precision == "int8":
        assert scales is not None
        floats = floats * scales[:, None]
    return floats * 2 - 1 if precision == "ubinary" else floats
