"""Two commands at once on one new directory, and commands that are stopped by signals."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from command_line import Outcome, gen_fast
from tiny_corpus import embed_in_process, files_of, finished_parts, options, write_corpus

from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.verify import verify


@pytest.mark.parametrize("races", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_two_settings_at_once(tiny_model: Path, tmp_path: Path, races: int) -> None:
    """One wins, the other is refused by the name of what differs; the result is the winner's."""
    corpus = write_corpus(tmp_path / "corpus.jsonl", 100)
    prompts = ("say: ", "tell: ")
    alone = {}
    for number, prompt in enumerate(prompts):
        embed_corpus(corpus, tmp_path / f"alone{number}", **options(tiny_model, prompt=prompt))
        alone[prompt] = files_of(tmp_path / f"alone{number}")
    for race in range(races):
        out = tmp_path / f"out{race}"
        outcomes: dict[str, Outcome] = {}

        def run(prompt: str, out: Path = out, outcomes: dict[str, Outcome] = outcomes) -> None:
            cwd = tmp_path / prompt.strip(": ")
            cwd.mkdir(exist_ok=True)
            outcomes[prompt] = gen_fast(
                "embed", corpus, "--out", out, "--model", tiny_model, "--dtype", "float32",
                "--text-column", "text", "--id-column", "key", "--rows-per-part", 16,
                "--prompt", prompt, cwd=cwd,
            )  # fmt: skip

        threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winner, loser = sorted(prompts, key=lambda prompt: outcomes[prompt].code)
        outcomes[winner].succeeded()
        outcomes[loser].refused(f"prompt was {winner!r}, now it is {loser!r}")
        assert files_of(out) == alone[winner]
        assert verify(out) == []


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_temporary_files_of_a_stopped_run_are_gone(
    tiny_model: Path, tmp_path: Path, kills: int
) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 200)
    settings, draw = options(tiny_model, rows_per_part=8), random.Random(0)
    out = tmp_path / "out"
    for _ in range(kills):
        before = finished_parts(out)
        process = embed_in_process([corpus], out, settings)
        while process.is_alive() and finished_parts(out) <= before:
            time.sleep(draw.uniform(0, 0.005))
        stop = draw.choice([signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, stop)
        process.join()
    # What a signal may leave at any moment, a process that writes it being gone.
    for name in (".part-00003.parquet.0.tmp", ".plan.json.0.tmp", "_parts/.part-00004.json.0.tmp"):
        (out / name).write_bytes(b"half")
    (out / ".ids.0").mkdir()
    embed_corpus(corpus, out, **settings)
    assert list(out.rglob(".*")) == []
    assert verify(out) == []
