"""The command line in a forked process, and ways to damage a file behind its back."""

import io
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from warm_processes import processes

SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, negative for a signal, and what it said."""

    code: int
    stdout: str
    stderr: str

    def refused(self, *words: str, code: int | None = None) -> str:
        """Expect one line of error that has these words; return it."""
        lines = self.errors()
        assert self.code > 0, self
        assert len(lines) == 1, self
        assert code in (None, self.code), self
        for word in words:
            assert word in lines[0], (word, lines[0])
        return lines[0]

    def succeeded(self) -> str:
        """Expect no error; return stdout."""
        assert self.code == 0, self
        assert not self.errors(), self
        return self.stdout

    def errors(self) -> list[str]:
        """The lines that begin as an error does. Expects no traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        return [line for line in self.stderr.splitlines() if line.startswith("gen-fast: error: ")]


def gen_fast(
    *arguments: object,
    cwd: Path,
    environment: dict[str, str] | None = None,
    seconds: float = SECONDS,
) -> Outcome:
    """Run `gen-fast ARGUMENTS` to its end, in a process forked from one that is warm."""
    out, err = cwd / f".stdout.{os.getpid()}", cwd / f".stderr.{os.getpid()}"
    given = [str(argument) for argument in arguments]
    process = processes.Process(target=_run, args=(given, cwd, out, err, environment or {}))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"{given} still ran after {seconds} s: {err.read_text()}")
    said = [path.read_text(errors="replace") for path in (out, err)]
    for path in (out, err):
        path.unlink()
    assert process.exitcode is not None
    return Outcome(process.exitcode, *said)


def _run(
    arguments: list[str], cwd: Path, out: Path, err: Path, environment: dict[str, str]
) -> None:
    """In the new process: the streams are files, as behind a shell's redirection."""
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", **environment})
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    os.chdir(cwd)
    import torch

    from gen_fast.cli import app

    torch.set_num_threads(1)
    sys.argv = ["gen-fast", *arguments]
    app(arguments, prog_name="gen-fast")


def flips(path: Path, count: int, seed: int = 0, start: int = 0) -> Iterator[str]:
    """Flip one bit of a file after another, each undone before the next; gives where.

    start: the first byte that may be hit.
    """
    original = path.read_bytes()
    draw = random.Random(seed)
    bits = range(8 * start, 8 * len(original))
    for bit in draw.sample(bits, min(count, len(bits))):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        yield f"{path.name}, bit {bit % 8} of byte {bit // 8} of {len(original)}"
        path.write_bytes(original)
