"""Embeddings to npy, parquet or safetensors files and back, or to stdout as jsonl."""

import hashlib
import json
import math
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gen_fast.errors import InputError
from gen_fast.io.durable import replacing
from gen_fast.io.json_files import parse_json
from gen_fast.io.regular_files import check_regular
from gen_fast.io.rows import named_errors

STDOUT = "-"
EMBEDDING_SUFFIXES = (".npy", ".parquet", ".safetensors")
_METADATA_KEY = "gen_fast"
_CHECKSUM_KEY = "gen_fast.sha256"
# safetensors refuses to read a larger header; some room is left for its other fields.
_SAFETENSORS_HEADER_BYTES = 100_000_000 - 4096


@dataclass(frozen=True)
class EmbeddingMetadata:
    """How embeddings were made: what a search needs to embed queries the same way.

    Kept as a JSON object under the key "gen_fast" of a file's metadata.

    dimension: of the embeddings; model_dimension: of the model, larger if they were truncated.
    dtype: what the backbone computed in; embeddings are always stored as float32.
    backbone: given for an adapter by hand, else empty. quantize: what its weights were quantised
    to while it was loaded, else empty, also for a quantised copy.
    fingerprint: of the backbone's weights, see gen_fast.model.fingerprint; empty if unknown.
    """

    model: str
    method: str
    prompt: str
    normalized: bool
    dimension: int
    model_dimension: int
    dtype: str
    backbone: str = ""
    quantize: str = ""
    fingerprint: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Embeddings:
    """vectors [n, d] float32 with n ids; texts and metadata are None where the file has none."""

    ids: list[str]
    vectors: np.ndarray
    texts: list[str] | None = None
    metadata: EmbeddingMetadata | None = None


def check_embedding_file(target: str | Path, ids: Sequence[str], texts: Sequence[str]) -> None:
    """Raise InputError if the format of `target` cannot hold these ids and texts.

    Worth asking before the embeddings are computed.
    """
    suffix = Path(target).suffix
    if str(target) != STDOUT and suffix not in EMBEDDING_SUFFIXES:
        raise InputError(
            f"{target}: embeddings go to {', '.join(EMBEDDING_SUFFIXES)}, not {suffix!r}"
        )
    if suffix == ".safetensors":
        header = json.dumps(_header(ids, texts), ensure_ascii=False)
        if len(header.encode()) > _SAFETENSORS_HEADER_BYTES:
            raise InputError(
                f"{target}: safetensors keeps ids and texts in a header of at most 100 MB, and "
                "these take more; write parquet"
            )


def write_embeddings(target: str | Path, embeddings: Embeddings) -> None:
    """Write embeddings to a .npy, .parquet or .safetensors file, or to stdout if `target` is "-".

    npy holds the vectors [n, d] alone. parquet has the columns id, text and embedding
    (fixed-size list of d float32), safetensors the tensor "embeddings" and, in its metadata, ids
    and texts as JSON lists; both carry EmbeddingMetadata and a checksum of all this. stdout gets an
    object {"id", "embedding"} a line. A file appears under its name only when it is complete.

    Raises InputError as check_embedding_file does, and OSError naming the file.
    """
    check_embedding_file(target, embeddings.ids, embeddings.texts or [])
    if str(target) == STDOUT:
        try:
            _print(embeddings)
        except BrokenPipeError:  # the reader has stopped
            raise
        except OSError as error:
            raise OSError(f"stdout: cannot be written: {error.strerror}") from error
        return
    target = Path(target)
    try:
        with replacing(target) as temporary:
            with temporary.open("xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if target.suffix == ".npy":
                    _write_npy(file, embeddings.vectors)
                elif target.suffix == ".parquet":
                    pyarrow.parquet.write_table(_table(embeddings), file, use_dictionary=False)
            if target.suffix == ".safetensors":
                _save_safetensors(temporary, embeddings)
                temporary.chmod(mode)  # safetensors makes files that only their owner may read
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{target}: cannot be written: {reason}") from error


def _print(embeddings: Embeddings) -> None:
    for identifier, vector in zip(embeddings.ids, embeddings.vectors, strict=True):
        record = {"id": identifier, "embedding": vector.tolist()}
        sys.stdout.buffer.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    sys.stdout.buffer.flush()


def _write_npy(file: IO[bytes], vectors: np.ndarray) -> None:
    """As np.save does, whose own way to a file says nothing of why it failed."""
    vectors = np.ascontiguousarray(vectors)
    header = np.lib.format.header_data_from_array_1_0(vectors)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(vectors.data)


def _header(ids: Sequence[str], texts: Sequence[str] | None) -> dict[str, str]:
    """Ids and texts as safetensors keeps them."""
    values = {"ids": ids, "texts": texts}
    return {
        key: json.dumps(value, ensure_ascii=False)
        for key, value in values.items()
        if value is not None
    }


def _metadata(embeddings: Embeddings) -> dict[str, str]:
    """What is kept in a file's metadata: how the embeddings were made, and a checksum."""
    made = None
    if embeddings.metadata is not None:
        made = json.dumps(asdict(embeddings.metadata), ensure_ascii=False)
    checksum = _checksum(embeddings.ids, embeddings.texts, embeddings.vectors, made)
    return {**({} if made is None else {_METADATA_KEY: made}), _CHECKSUM_KEY: checksum}


def _checksum(
    ids: Sequence[str], texts: Sequence[str] | None, vectors: np.ndarray, made: str | None
) -> str:
    """The sha256 of all that a file of embeddings says, however its format lays it out."""
    digest = hashlib.sha256(f"{made} {vectors.shape} {texts is not None}".encode())
    for text in (*ids, *(texts or ())):
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    digest.update(np.ascontiguousarray(vectors, dtype="<f4").data)
    return digest.hexdigest()


def _save_safetensors(path: Path, embeddings: Embeddings) -> None:
    header = {**_header(embeddings.ids, embeddings.texts), **_metadata(embeddings)}
    save_file({"embeddings": np.ascontiguousarray(embeddings.vectors)}, path, header)


def _table(embeddings: Embeddings) -> Any:
    flat = pa.array(embeddings.vectors.ravel(), pa.float32())
    columns = {"id": pa.array(embeddings.ids, pa.large_string())}
    if embeddings.texts is not None:
        columns["text"] = pa.array(embeddings.texts, pa.large_string())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, embeddings.vectors.shape[1])
    return pa.table(columns, metadata=_metadata(embeddings))


def read_embeddings(source: str | Path) -> Embeddings:
    """Read what write_embeddings wrote, or another file of the same columns or tensor.

    Without ids in the file, rows are numbered from 0. Raises InputError if the file is damaged or
    an embedding holds NaN or infinity.
    """
    path = Path(source)
    if path.suffix not in EMBEDDING_SUFFIXES:
        raise InputError(f"{path}: not one of {', '.join(EMBEDDING_SUFFIXES)}")
    try:
        with named_errors(str(path)):
            check_regular(path)
            values = _EMBEDDING_READERS[path.suffix](path)
            made = values.get(_METADATA_KEY)
            metadata = None if made is None else EmbeddingMetadata(**parse_json(made))
    # SyntaxError, TokenError: numpy reads the header of a .npy as Python.
    except (
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        SafetensorError,
        SyntaxError,
        TokenError,
        RecursionError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable file of embeddings: {error}") from error
    vectors: np.ndarray = values["embeddings"]
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise InputError(
            f"{path}: expected embeddings [n, d] of floats, got {vectors.dtype} of shape "
            f"{vectors.shape}"
        )
    vectors = np.asarray(vectors, dtype=np.float32)
    for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1))[:1]:
        raise InputError(f"{path}, row {row}: the embedding holds NaN or infinity")
    texts = values.get("texts")
    ids = values.get("ids") or [str(row) for row in range(len(vectors))]
    for name, column in (("ids", ids), ("texts", texts)):
        if column is not None and len(column) != len(vectors):
            raise InputError(f"{path}: {len(vectors)} embeddings but {len(column)} {name}")
    checksum = values.get(_CHECKSUM_KEY)
    if checksum is not None and checksum != _checksum(ids, texts, vectors, made):
        raise InputError(f"{path} is damaged: it does not have its checksum")
    return Embeddings(ids, vectors, texts, metadata)


def _load_npy(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise InputError(f"{path}: version {version} of the format is not read")
        shape, _, dtype = _NPY_HEADERS[version](file)
        size, stored = math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell()
        if size > stored:  # before memory is asked for
            raise InputError(f"{path}: {stored} bytes of data, and its header speaks of {size}")
        file.seek(0)
        return {"embeddings": np.lib.format.read_array(file, allow_pickle=False)}


def _load_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "numpy") as file:
        header = file.metadata() or {}
        known = {k: parse_json(header[k]) for k in ("ids", "texts") if k in header}
        return {**header, **known, "embeddings": file.get_tensor("embeddings")}


def _load_parquet(path: Path) -> dict[str, Any]:
    table = pyarrow.parquet.read_table(path)
    chunks = table["embedding"].chunks
    kind = table.schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or table["embedding"].null_count:
        raise InputError(f"{path}: column 'embedding' is {kind}, not a fixed-size list per row")
    # The empty part is for a file without rows, which has no chunks.
    parts = [np.empty((0, kind.list_size), np.float32)]
    parts += [np.asarray(c.flatten()).reshape(len(c), kind.list_size) for c in chunks]
    values: dict[str, Any] = {"embeddings": np.concatenate(parts)}
    for key, column in (("ids", "id"), ("texts", "text")):
        if column in table.column_names:
            values[key] = table[column].cast(pa.large_string()).to_pylist()
    header = table.schema.metadata or {}
    known = (key for key in (_METADATA_KEY, _CHECKSUM_KEY) if key.encode() in header)
    return {**values, **{key: header[key.encode()].decode() for key in known}}


_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_EMBEDDING_READERS = {
    ".npy": _load_npy,
    ".parquet": _load_parquet,
    ".safetensors": _load_safetensors,
}
