"""A job under any sequence of what can happen to it, against a model of what it must hold."""

import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tiny_corpus import embed_in_process, files_of, finished_parts, options, write_corpus

from gen_fast.errors import JobError
from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.verify import verify

_ROWS = 60


class JobMachine(RuleBasedStateMachine):
    """Runs, kills, damage and new inputs; a second job that is left in peace is the model."""

    model: Path

    @initialize()
    def begin(self) -> None:
        """Write the first input."""
        self.folder = Path(tempfile.mkdtemp())
        self.inputs = self.folder / "in"
        self.inputs.mkdir()
        self.out = self.folder / "out"
        self.files = 0
        self.planned = 0
        self.append()

    @rule()
    @precondition(lambda self: self.files < 4)
    def append(self) -> None:
        """Another input, some of whose ids are taken."""
        write_corpus(self.inputs / f"{self.files}.jsonl", _ROWS, first=_ROWS * self.files * 9 // 10)
        self.files += 1

    @rule()
    def run(self) -> None:
        """Run to the end, with whatever inputs there are."""
        embed_corpus(self.inputs, self.out, **options(self.model), append=True)
        self.planned = self.files
        assert files_of(self.out) == self._expected()
        assert verify(self.out) == []

    @rule()
    def resume(self) -> None:
        """The same command without --append: refused if, and only if, there are new inputs."""
        if self.planned and self.planned < self.files:
            with pytest.raises(JobError, match="is a new input"):
                embed_corpus(self.inputs, self.out, **options(self.model))
        else:
            embed_corpus(self.inputs, self.out, **options(self.model))
            self.planned = self.files
            assert files_of(self.out) == self._expected()

    @rule(parts=st.integers(0, 6), delay=st.floats(0, 0.02))
    def kill(self, parts: int, delay: float) -> None:
        """Run, and SIGKILL behind so many more parts."""
        before = finished_parts(self.out)
        process = embed_in_process([self.inputs], self.out, {**options(self.model), "append": True})
        while process.is_alive() and finished_parts(self.out) < before + parts:
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.join()
        if (self.out / "plan.json").exists():
            self.planned = (self.out / "plan.json").read_text().count(".jsonl")

    @rule(seed=st.integers(0, 1 << 20))
    def damage(self, seed: int) -> None:
        """Flip a bit of a part or of what tells about parts, cut it off, empty it or delete it."""
        # Which files there are depends on when a process was killed: hypothesis must not draw.
        choice = random.Random(seed)
        others = [self.out / name for name in ("manifest.json", "rejected.jsonl")]
        found = [*self.out.glob("part-*"), *self.out.glob("_parts/*"), *others]
        found = sorted(path for path in found if path.exists())
        if not found:
            return
        path = choice.choice(found)
        content = bytearray(path.read_bytes())
        how = choice.choice(["flip", "cut", "empty", "delete"])
        if how == "flip" and content:
            content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
        if how == "delete":
            path.unlink()
        else:
            half = content[: len(content) // 2]
            path.write_bytes({"flip": content, "cut": half, "empty": b""}[how])

    @invariant()
    def what_looks_finished_is_verified_or_named(self) -> None:
        """verify finds nothing wrong only where the files are those of a run in peace."""
        if hasattr(self, "out") and (self.out / "_SUCCESS").exists() and self._nothing_wrong():
            assert files_of(self.out) == self._expected(self.planned)

    def _nothing_wrong(self) -> bool:
        """What verify says; a manifest that is gone or cannot be read is an error that names it."""
        try:
            return verify(self.out) == []
        except JobError as error:
            refusal = str(error)
        assert "manifest.json" in refusal
        return False

    def _expected(self, files: int | None = None) -> dict[str, bytes]:
        """The files of a job over the first inputs that nothing happened to."""
        count = self.files if files is None else files
        peaceful = self.folder / f"peaceful{count}"
        if not peaceful.exists():
            sources = [self.inputs / f"{i}.jsonl" for i in range(count)]
            embed_corpus(sources, peaceful, **options(self.model))
        return files_of(peaceful)

    def teardown(self) -> None:
        """Remove everything."""
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


def _run(model: Path, **changes: Any) -> None:
    JobMachine.model = model
    machine = JobMachine.TestCase
    machine.settings = settings(
        deadline=None, suppress_health_check=list(HealthCheck), database=None, **changes
    )
    machine("runTest").runTest()


def test_any_sequence(tiny_model: Path) -> None:
    """The same few histories each time."""
    _run(tiny_model, max_examples=8, stateful_step_count=8, derandomize=True)


@pytest.mark.slow
def test_new_histories(tiny_model: Path) -> None:
    """Others each time, and longer ones; a failure prints its history."""
    _run(tiny_model, max_examples=100, stateful_step_count=15)
