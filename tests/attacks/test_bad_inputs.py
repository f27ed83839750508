"""Bad arguments, files and places through the command line: one line of error, and no traceback."""

import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from command_line import Outcome, gen_fast
from fuzzing import Damage, damages, few_or_many
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_fast.errors import GenFastError
from gen_fast.io.embedding_files import Embeddings, read_embeddings, write_embeddings
from gen_fast.io.row_files import open_rows
from gen_fast.io.text_files import read_texts

NOT_UTF8 = "\udcff\udcfe"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two texts, a loop of links and a pipe."""
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe.npy")
    return tmp_path


def run(folder: Path, model: Path, command: str, *arguments: object) -> Outcome:
    where = ["--device", "cpu"] if command != "embed" else []
    chosen = ["--model", model, "--dtype", "float32", "--quiet", *where]
    return gen_fast(command, *arguments, *chosen, cwd=folder, seconds=60)


@pytest.mark.parametrize(
    "arguments",
    [
        (f"{NOT_UTF8}.txt", "--out", "o.npy"),
        ("a.txt", "--out", f"{NOT_UTF8}.npy"),
        ("a.txt", "--out", "o.npy", "--prompt", NOT_UTF8),
        ("a.txt", "--out", "o.npy", "--backbone", NOT_UTF8),
    ],
)
def test_an_argument_that_is_not_utf8(
    folder: Path, tiny_model: Path, arguments: tuple[str, ...]
) -> None:
    run(folder, tiny_model, "encode", *arguments).refused("udcff", "is not UTF-8", code=2)


def test_a_file_of_a_corpus_whose_name_is_not_utf8(folder: Path, tiny_model: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / f"{NOT_UTF8}.txt").write_text("text\n")
    outcome = run(folder, tiny_model, "embed", "in", "--out", "job")
    outcome.refused("udcff", "is not UTF-8", code=3)


@pytest.mark.parametrize(
    ("command", "source", "reason"),
    [
        ("encode", "loop.txt", "symbolic links"),
        ("embed", "loop.txt", "symbolic links"),
        ("encode", "pipe.txt", "a pipe"),
        ("embed", "pipe.txt", "a pipe"),
        ("encode", "/dev/zero", "a device"),
        ("embed", "/dev/zero", "a device"),
        ("search", "pipe.npy", "a pipe"),
    ],
)
def test_what_is_no_file(
    folder: Path, tiny_model: Path, command: str, source: str, reason: str
) -> None:
    rest = ["query"] if command == "search" else ["--out", "job" if command == "embed" else "o.npy"]
    rest += ["--format", "txt"] if source == "/dev/zero" else []
    run(folder, tiny_model, command, source, *rest).refused(source, reason, code=3)
    assert not (folder / "o.npy").exists()


def test_a_file_that_may_not_be_read(folder: Path, tiny_model: Path) -> None:
    (folder / "a.txt").chmod(0)
    if os.access(folder / "a.txt", os.R_OK):
        pytest.skip("root reads everything")
    for command, out in (("encode", "o.npy"), ("embed", "job")):
        outcome = run(folder, tiny_model, command, "a.txt", "--out", out)
        outcome.refused("a.txt", "Permission denied", code=3)


@pytest.mark.parametrize("seconds", ["inf", "1e300"])
def test_a_timeout_that_no_clock_reaches(folder: Path, tiny_model: Path, seconds: str) -> None:
    outcome = run(folder, tiny_model, "embed", "a.txt", "--out", "j", "--stall-timeout", seconds)
    outcome.refused("stall_timeout", code=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("top-p", "-1"),
        ("top-p", "nan"),
        ("temperature", "1e-45"),
        ("temperature", "inf"),
    ],
)
def test_a_sampling_that_means_nothing(
    folder: Path, tiny_model: Path, option: str, value: str
) -> None:
    warm = [] if option == "temperature" else ["--temperature", "0.7"]
    arguments = ["a.txt", "--out", "o.jsonl", "--max-new-tokens", "4", *warm, f"--{option}", value]
    outcome = run(folder, tiny_model, "generate", *arguments)
    outcome.refused(option.replace("-", "_"), code=2)


def test_any_integer_is_a_seed(folder: Path, tiny_model: Path) -> None:
    arguments = ["a.txt", "--out", "o.jsonl", "--max-new-tokens", "4", "--temperature", "0.7"]
    run(folder, tiny_model, "generate", *arguments, "--seed", 2**70).succeeded()


def test_a_pipe_is_not_replaced_by_an_output(folder: Path, tiny_model: Path) -> None:
    run(folder, tiny_model, "encode", "a.txt", "--out", "pipe.npy").refused("pipe.npy", code=2)


def test_a_disk_that_is_full(folder: Path, tiny_model: Path) -> None:
    """The system's limit on a file's size stands for the disk."""
    (folder / "many.txt").write_text("text\n" * 2000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "from gen_fast.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "encode", "many.txt", "--out", "o.npy"]
    command += ["--model", str(tiny_model), "--device", "cpu", "--quiet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "gen-fast: error: o.npy: cannot be written: File too large\n"
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert not list(folder.glob("*o.npy*"))


CLOSED, FULL = (">&-", "Bad file descriptor"), (">/dev/full", "No space left on device")
INFO, ENCODE = "info --device cpu", "encode a.txt --out - --device cpu"


@pytest.mark.parametrize(
    ("command", "redirection", "reason"),
    [
        (INFO, *CLOSED),
        (ENCODE, *FULL),
        pytest.param(INFO, *FULL, marks=pytest.mark.slow),
        pytest.param(ENCODE, *CLOSED, marks=pytest.mark.slow),
    ],
)
def test_a_stdout_that_takes_nothing(
    folder: Path, tiny_model: Path, redirection: str, reason: str, command: str
) -> None:
    script = Path(sys.executable).parent / "gen-fast"
    command = f"{script} {command} --model {tiny_model} {redirection}"
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == f"gen-fast: error: stdout: cannot be written: {reason}\n"


def test_streams_that_are_closed_and_not_needed(folder: Path, tiny_model: Path) -> None:
    script = Path(sys.executable).parent / "gen-fast"
    command = f"{script} encode a.txt --out o.npy --model {tiny_model} --device cpu <&- >&- 2>&-"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0
    assert len(read_embeddings(folder / "o.npy").ids) == 2


# ------------------------------------------------------------------------------ fuzzing

ROWS = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.sampled_from(
            [
                b'{"text": "a"}',
                b'{"text": 1e999, "text": "b"}',
                b'{"text": "\\ud800"}',
                b"[" * 5000,
                b'{"a":' * 3000,
                b"1" * 5000,
                b'"',
                b'a,"b',
                b'b",c',
                b'"x""y",z',
                b"\xef\xbb\xbf",
                b"\x00",
                b"\r",
                b"text,n",
            ]
        ),
    ),
    max_size=40,
).map(b"\n".join)


@few_or_many
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet", ".csv.gz", ".txt.zst"])
def test_rows_of_any_bytes(tmp_path: Path, suffix: str, examples: settings) -> None:
    """Every row is there or has a problem; the rest is a GenFastError."""
    path = tmp_path / f"rows{suffix}"

    @examples
    @given(content=ROWS)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with suppress(GenFastError):
            file = open_rows(path)
            rows = list(file.rows(["text"]))
            assert [row.number for row in rows] == list(range(len(rows)))
            *starts, end = file.positions(3)
            assert end.row == len(rows)
            assert [start.row for start in starts] == list(range(0, len(rows), 3))
            read_texts(path)

    check()


@few_or_many
@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_a_damaged_file_of_embeddings(tmp_path: Path, suffix: str, examples: settings) -> None:
    path = tmp_path / f"embeddings{suffix}"
    write_embeddings(path, Embeddings(["a", "b"], np.ones((2, 3), np.float32), ["x", "y"]))
    content = path.read_bytes()

    @examples
    @given(damage=damages())
    def check(damage: Damage) -> None:
        path.write_bytes(damage.done_to(content))
        with suppress(GenFastError):
            read = read_embeddings(path)
            assert np.isfinite(read.vectors).all()
            assert len(read.ids) == len(read.vectors)

    check()
