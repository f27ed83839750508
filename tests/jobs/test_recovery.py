"""Jobs that were killed, that failed, whose files were damaged: the same command mends them."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_corpus import (
    embed_in_process,
    files_of,
    finished_parts,
    options,
    work_in_process,
    write_corpus,
)

from gen_fast.errors import InputError, JobError
from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.settings import PlanSettings
from gen_fast.jobs.verify import verify


@pytest.fixture
def run_job(corpus: Path, tiny_model: Path, tmp_path: Path) -> Callable[[], Path]:
    """run_job(): run the one command of a job, the first time or again; gives its directory."""

    def run() -> Path:
        embed_corpus(corpus, tmp_path / "out", **options(tiny_model))
        return tmp_path / "out"

    return run


def test_a_finished_job_is_left_as_it_is(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embed_corpus(corpus, tmp_path / "out", **options(tiny_model))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(PlanSettings, "load_encoder", lambda *_: pytest.fail("was loaded"))
    assert embed_corpus(corpus, tmp_path / "out", **options(tiny_model)) == first
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert after == before


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_resumed(
    corpus: Path,
    tiny_model: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    kills: int,
    workers: int,
) -> None:
    """SIGKILL leaves neither a lost nor a doubled row: the bytes are those of a run in peace."""
    settings = options(tiny_model)
    draw = random.Random(workers)
    out = tmp_path / "out"
    seen = [0]
    for kill in range(kills):
        if workers == 1 or not (out / "plan.json").exists():
            running = [embed_in_process([corpus], out, settings)]
        else:
            running = [work_in_process(out, index, workers) for index in range(workers)]
        # A few at any moment from the start on, the others within the next parts.
        limit = time.monotonic() + (draw.uniform(0, 1.5) if kill % 4 == 0 else 60)
        wanted = seen[-1] + draw.randint(0, 2)
        while time.monotonic() < limit and any(process.is_alive() for process in running):
            if finished_parts(out) > wanted:
                break
            time.sleep(draw.uniform(0, 0.005))
        # Both workers die, or one while the other works on.
        for process in running[: draw.randint(1, workers)]:
            process.kill()
        for process in running:
            process.join(timeout=60)
            assert process.exitcode is not None
        seen.append(finished_parts(out))
        if seen[-1] == 25:
            for path in draw.sample(sorted(out.glob("part-*")), 12):  # there is work again
                path.unlink()
            seen.append(13)
    assert len(set(seen)) > 3, seen
    embed_corpus(corpus, out, **settings)
    assert files_of(out) == expected
    assert verify(out) == []
    assert not list(out.glob(".*.tmp"))


def test_what_failed_can_be_run_again_at_once(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """An error gives claims back: other processes need not wait for this one to end."""
    with pytest.raises(InputError, match="line 8: empty"):
        embed_corpus(corpus, tmp_path / "out", **options(tiny_model), strict=True)
    second = embed_in_process([corpus], tmp_path / "out", options(tiny_model))
    second.join(timeout=60)
    assert second.exitcode == 0
    assert files_of(tmp_path / "out") == expected


def test_a_full_disk(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """A limit of the process on file sizes fails as a full disk does: part of the way through."""
    out = tmp_path / "out"
    program = (
        "import resource, signal, sys, json; from pathlib import Path\n"
        "from gen_fast.jobs.job import embed_corpus\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "settings = json.loads(sys.argv[3])\n"
        "import gen_fast.jobs.parts as parts\n"
        "write = parts.PartStore.write\n"
        "def limited(self, read, *rest):\n"
        "    if read.part.number == 3:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "    return write(self, read, *rest)\n"
        "parts.PartStore.write = limited\n"
        "embed_corpus(sys.argv[1], sys.argv[2], **settings)\n"
    )
    settings = options(tiny_model)
    given = json.dumps({**settings, "model": str(tiny_model)})
    done = subprocess.run(
        [sys.executable, "-c", program, str(corpus), str(out), given],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "JobError: cannot write" in done.stderr
    assert "the finished parts are intact" in done.stderr
    assert finished_parts(out) == 3
    embed_corpus(corpus, out, **settings)
    assert files_of(out) == expected


def test_a_directory_that_cannot_be_written(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"file/out cannot be used"):
        embed_corpus(corpus, tmp_path / "file" / "out", **options(tiny_model))


def test_a_manifest_that_cannot_be_read_is_mended(
    run_job: Callable[[], Path], expected: dict[str, bytes]
) -> None:
    out = run_job()
    manifest = (out / "manifest.json").read_text()
    for damaged in (
        '{"parts": ' * 100_000,
        "[]",
        manifest.replace('"sha256"', '"sha257"', 1),
        manifest.replace('"rows": 392', '"rows": "392"'),
        manifest.replace('"rejected_sha256"', '"rejected_sha257"'),
        manifest.replace('"parts": [', '"parts": [7,'),
    ):
        (out / "manifest.json").write_text(damaged)
        with pytest.raises(JobError, match=r"manifest\.json is damaged"):
            verify(out)
        run_job()
        assert files_of(out) == expected
    for path in ("rejected.jsonl", "_parts/part-00003.json", "_parts/part-00003.rejected.jsonl"):
        (out / path).write_text('{"a": ' * 100_000)
        assert verify(out) != []
        run_job()
        assert files_of(out) == expected


def test_a_part_that_the_plan_does_not_have(
    run_job: Callable[[], Path], expected: dict[str, bytes]
) -> None:
    """Such as those of a larger job whose plan was replaced by that of a smaller one."""
    out = run_job()
    stray = out / "part-00025.parquet"
    stray.write_bytes((out / "part-00003.parquet").read_bytes())
    assert verify(out) == [f"{stray} is no part of the plan: move it away"]
    with pytest.raises(JobError, match=r"part-00025.parquet is none of the 25 parts of plan\.json"):
        run_job()
    stray.unlink()
    run_job()
    assert files_of(out) == expected


def test_the_plan_of_a_smaller_job_does_not_pass(tiny_model: Path, tmp_path: Path) -> None:
    """A copy of a plan from before --append: its seal is right, and it says too little."""
    inputs = [write_corpus(tmp_path / f"{i}.jsonl", 40, first=40 * i) for i in range(2)]
    out = tmp_path / "out"
    embed_corpus(inputs[0], out, **options(tiny_model))
    small = (out / "plan.json").read_bytes()
    embed_corpus(inputs, out, **options(tiny_model), append=True)
    (out / "plan.json").write_bytes(small)
    assert len(verify(out)) > 0
    with pytest.raises(JobError, match="replaced by that of a smaller job"):
        embed_corpus(inputs[0], out, **options(tiny_model))


def test_a_plan_that_is_extended_during_a_run_is_not_published_short(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [write_corpus(tmp_path / f"{i}.jsonl", 40, first=40 * i) for i in range(2)]
    out, settings = tmp_path / "out", options(tiny_model)
    load_encoder = PlanSettings.load_encoder

    def appending(self: PlanSettings, device: str) -> Any:
        monkeypatch.setattr(PlanSettings, "load_encoder", load_encoder)
        embed_corpus(inputs, out, **settings, append=True, plan_only=True)
        return load_encoder(self, device)

    monkeypatch.setattr(PlanSettings, "load_encoder", appending)
    with pytest.raises(JobError, match=r"plan\.json has been extended.*run again"):
        embed_corpus(inputs[0], out, **settings)
    assert not (out / "_SUCCESS").exists()
    embed_corpus(inputs, out, **settings)
    assert verify(out) == []


def test_damage_is_found_named_and_mended(
    run_job: Callable[[], Path], expected: dict[str, bytes]
) -> None:
    out = run_job()
    content = bytearray((out / "part-00002.parquet").read_bytes())
    content[200] ^= 1
    (out / "part-00002.parquet").write_bytes(content)
    (out / "part-00005.parquet").write_bytes(b"")
    (out / "part-00007.parquet").unlink()
    problems = verify(out)
    assert [problem.split("part-")[1][:5] for problem in problems] == ["00002", "00005", "00007"]
    rejected = (out / "rejected.jsonl").read_text()
    (out / "rejected.jsonl").write_text(rejected.replace("k7", "k8"))
    assert len(verify(out)) == 4
    run_job()
    assert verify(out) == []
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest.replace('"rows": 392', '"rows": 393'))
    assert len(verify(out)) == 1
    run_job()
    assert files_of(out) == expected
    assert verify(out) == []
