"""Writers and readers of embeddings."""

import io
import json
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from gen_fast.errors import InputError
from gen_fast.io.embedding_files import (
    EmbeddingMetadata,
    Embeddings,
    read_embeddings,
    write_embeddings,
)

METADATA = EmbeddingMetadata("m", "mean", "Ask: ", True, 3, 8, "float32", "", {"vocab_size": 5})


def embeddings(n: int = 2, texts: list[str] | None = None) -> Embeddings:
    vectors = np.arange(n * 3, dtype=np.float32).reshape(n, 3) / 7
    return Embeddings([f"ï{i}" for i in range(n)], vectors, texts, METADATA)


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
@pytest.mark.parametrize("n", [0, 2])
def test_embeddings_come_back(tmp_path: Path, suffix: str, n: int) -> None:
    texts = ["naïve café ☕", 'quote " and, comma'][:n]
    written = embeddings(n, texts)
    path = tmp_path / f"out{suffix}"
    write_embeddings(path, written)
    read = read_embeddings(path)
    assert read.vectors.dtype == np.float32
    np.testing.assert_array_equal(read.vectors, written.vectors)
    if suffix == ".npy":
        assert (read.ids, read.texts, read.metadata) == ([str(i) for i in range(n)], None, None)
    else:
        assert (read.ids, read.texts, read.metadata) == (written.ids, texts, METADATA)


def test_layout_that_other_tools_read(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "a.parquet", embeddings(2, ["x", "y"]))
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["id", "text", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    assert json.loads(table.schema.metadata[b"gen_fast"])["prompt"] == "Ask: "
    write_embeddings(tmp_path / "a.safetensors", embeddings(2, ["x", "y"]))
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert list(file.keys()) == ["embeddings"]
        assert json.loads(file.metadata()["texts"]) == ["x", "y"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_text("old")
    write_embeddings(path, embeddings())
    assert os.listdir(tmp_path) == [path.name]
    assert len(read_embeddings(path).vectors) == 2
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    path.write_text("old")
    broken = Embeddings(["only one id"], np.zeros((2, 3), np.float32))
    with pytest.raises(pa.ArrowInvalid):
        write_embeddings(path, broken)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_text() == "old"


def test_stdout_gets_jsonl(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    write_embeddings("-", embeddings())
    rows = [json.loads(line) for line in io.BytesIO(capfdbinary.readouterr().out)]
    assert [row["id"] for row in rows] == ["ï0", "ï1"]
    np.testing.assert_array_equal(
        np.array([row["embedding"] for row in rows], np.float32), embeddings().vectors
    )


def test_damaged_embedding_files(tmp_path: Path) -> None:
    for suffix in (".npy", ".parquet", ".safetensors"):
        path = tmp_path / f"bad{suffix}"
        path.write_bytes(b"nothing of the kind")
        with pytest.raises(InputError, match="bad"):
            read_embeddings(path)
        write_embeddings(path, embeddings(50))
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InputError, match="bad"):
            read_embeddings(path)
    vectors = np.zeros((3, 2), np.float32)
    vectors[1, 0] = np.nan
    np.save(tmp_path / "nan.npy", vectors)
    with pytest.raises(InputError, match=r"nan\.npy, row 1"):
        read_embeddings(tmp_path / "nan.npy")
    np.save(tmp_path / "bits.npy", np.zeros((3, 2), np.uint8))
    with pytest.raises(InputError, match=r"bits\.npy.*uint8"):
        read_embeddings(tmp_path / "bits.npy")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match=r"object\.npy"):
        read_embeddings(tmp_path / "object.npy")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"other\.parquet.*embedding"):
        read_embeddings(tmp_path / "other.parquet")


def test_npz_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.npz"):
        write_embeddings(tmp_path / "a.npz", embeddings())
    with pytest.raises(InputError, match=r"a\.npz"):
        read_embeddings(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
@pytest.mark.parametrize("rows", [1, 50_000])
def test_a_disk_that_is_full_is_said_with_the_files_name(
    tmp_path: Path, suffix: str, rows: int
) -> None:
    """The system's limit on a file's size stands for the disk. Nothing half written stays."""
    target = tmp_path / f"out{suffix}"
    vectors = np.ones((rows, 64), np.float32)

    def write() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            write_embeddings(target, Embeddings(["x"] * rows, vectors))
        except OSError as error:
            return str(error)
        return "no error"

    message = in_a_fork(write)
    assert message.startswith(f"{target}: cannot be written: "), message
    assert "File too large" in message
    assert list(tmp_path.iterdir()) == []


def in_a_fork(act: Callable[[], str]) -> str:
    """What `act` gives in a process of its own."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.write(writing, act().encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(process, 0)
    with os.fdopen(reading) as stream:
        return stream.read()


def test_npy_is_what_numpy_writes(tmp_path: Path) -> None:
    for vectors in (np.empty((0, 8), np.float32), np.ones((3, 8), np.float32)[:, ::2]):
        write_embeddings(tmp_path / "ours.npy", Embeddings(["x"] * len(vectors), vectors))
        np.save(tmp_path / "theirs.npy", np.ascontiguousarray(vectors))
        assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_a_pipe_is_no_file_of_embeddings(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"in{suffix}: cannot be read: it is a pipe, not a file"):
        read_embeddings(path)
