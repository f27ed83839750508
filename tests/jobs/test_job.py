"""Jobs from their inputs to their files: bad rows, resuming, every way to run them, faults."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_corpus import (
    embed_in_process,
    files_of,
    finished_parts,
    options,
    work_in_process,
    write_corpus,
)

import gen_fast
from gen_fast.errors import ConfigError, InputError, JobError, PromptError, TextError
from gen_fast.io.embedding_files import read_embeddings
from gen_fast.jobs.engines import _wait_for_cluster
from gen_fast.jobs.job import embed_columns, embed_corpus
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Plan, list_sources
from gen_fast.jobs.settings import Settings
from gen_fast.jobs.verify import verify
from gen_fast.jobs.watchdog import Watchdog
from gen_fast.model.device import make_current

ROWS = 400


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", ROWS)


@pytest.fixture(scope="module")
def expected(corpus: Path, tiny_model: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run of one process."""
    out = corpus.with_name("expected")
    embed_corpus(corpus, out, **options(tiny_model))
    assert verify(out) == []
    return files_of(out)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parts_hold_what_encode_gives(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    summary = embed_corpus(corpus, tmp_path / "out", **options(tiny_model))
    bad = range(7, ROWS, 50)
    assert summary is not None
    assert (summary.rows, summary.rejected, summary.parts) == (ROWS - len(bad), len(bad), 25)
    assert summary.rejected_by_kind == {
        "NUL character": 2, "duplicate id": 1, "empty": 2, "missing id": 1, "no string": 2,
    }  # fmt: skip
    rejected = lines_of(tmp_path / "out" / "rejected.jsonl")
    assert [row["row"] for row in rejected] == list(bad)
    assert rejected[0] == {
        "input": str(corpus), "row": 7, "place": "line 8", "id": "k7", "kind": "empty",
        "reason": "there is nothing to embed",
    }  # fmt: skip

    encoder = gen_fast.load(tiny_model, dtype="float32", device="cpu")
    rows = [row for i, row in enumerate(lines_of(corpus)) if i not in bad]
    read = [read_embeddings(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [i for part in read for i in part.ids] == [row["key"] for row in rows]
    vectors = np.concatenate([part.vectors for part in read])
    alone = encoder.encode([row["text"] for row in rows], prompt="say: ")
    np.testing.assert_allclose(vectors, alone, rtol=1e-4, atol=1e-5)
    assert read[0].metadata is not None
    assert read[0].metadata.prompt == "say: "

    log = lines_of(tmp_path / "out" / "log.jsonl")
    assert [line["part"] for line in log] == list(range(25))
    assert sum(line["rows"] for line in log) == summary.rows


def test_a_finished_job_is_left_as_it_is(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embed_corpus(corpus, tmp_path / "out", **options(tiny_model))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(Settings, "load_encoder", lambda *_: pytest.fail("was loaded"))
    assert embed_corpus(corpus, tmp_path / "out", **options(tiny_model)) == first
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert after == before


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_twenty_moments_and_resumed(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    """SIGKILL leaves neither a lost nor a doubled row: the bytes are those of a run in peace."""
    settings = options(tiny_model)
    draw = random.Random(workers)
    out = tmp_path / "out"
    seen = [0]
    for kill in range(20):
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


def test_two_processes_of_this_machine(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    embed_corpus(corpus, tmp_path / "out", **options(tiny_model), devices="cpu,cpu")
    assert files_of(tmp_path / "out") == expected


def test_two_processes_of_torchrun(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "-m", "gen_fast.cli", "embed", str(corpus), "--quiet"]
        command += ["--model", str(tiny_model), "--dtype", "float32", "--text-column", "text"]
        command += ["--id-column", "key", "--rows-per-part", "16", *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)

    one, two = str(tmp_path / "out"), str(tmp_path / "two")
    assert run("--out", one, "--prompt", "say: ").returncode == 0
    assert files_of(tmp_path / "out") == expected
    # Several jobs, one after the other in each process.
    assert run("--out", two, "--text-column", "title", "--prompt-name", "query").returncode == 0
    assert verify(tmp_path / "two" / "text") == []
    assert verify(tmp_path / "two" / "title") == []
    # Another prompt is refused by the first rank, and so by all.
    wrong = run("--out", one, "--prompt", "tell: ")
    assert wrong.returncode
    assert "prompt was 'say: ', now it is 'tell: '" in wrong.stderr


def test_two_actors_of_ray(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    import ray

    settings: dict[str, Any] = {**options(tiny_model), "engine": "ray"}
    try:
        embed_corpus(corpus, tmp_path / "out", **settings, devices=2)
        with pytest.raises(JobError, match="has had no GPU for 1 seconds"):
            _wait_for_cluster("GPU", 1, 1)
        # More than the cluster has: it begins with those there are.
        embed_corpus(corpus, tmp_path / "many", **settings, devices=25)
    finally:
        ray.shutdown()
    assert files_of(tmp_path / "out") == expected
    assert files_of(tmp_path / "many") == expected


def test_a_worker_that_dies_leaves_its_parts_to_the_others(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    settings = options(tiny_model)
    # A process that has claimed parts and stops without ending: only a lock tells.
    first = embed_in_process([corpus], out, settings)
    while not (out / "log.jsonl").exists():
        time.sleep(0.01)
    os.kill(first.pid or 0, signal.SIGSTOP)
    second = embed_in_process([corpus], out, settings)
    second.join(timeout=5)
    assert second.is_alive(), "it must wait for the parts that the first has claimed"
    first.kill()
    second.join(timeout=60)
    assert second.exitcode == 0
    assert files_of(out) == expected


def test_a_worker_that_hangs_ends_itself(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """A fifo as input that nobody writes to: reading hangs in the system, for ever."""
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    plan = Plan.load(out)
    PartStore(out, plan).remove(plan.parts[3])
    (out / "_SUCCESS").unlink()
    hanging = tmp_path / "hanging.jsonl"
    os.mkfifo(hanging)
    text = (out / "plan.json").read_text()
    (out / "plan.json").write_text(text.replace(str(corpus), str(hanging)))
    stdin, parent = os.pipe()  # the worker ends when this end closes
    done = subprocess.run(
        [sys.executable, "-m", "gen_fast.jobs.worker", str(out), "--device", "cpu",
         "--stall-timeout", "2"],
        check=False, capture_output=True, text=True, timeout=60, stdin=stdin,
    )  # fmt: skip
    os.close(stdin)
    os.close(parent)
    assert done.returncode == 1
    assert "Timeout (0:00:02)!" in done.stderr
    (out / "plan.json").write_text(text)
    embed_corpus(corpus, out, **options(tiny_model))
    assert files_of(out) == expected


def test_a_plan_that_hangs_ends_the_process(tiny_model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hanging.jsonl")
    command = [sys.executable, "-m", "gen_fast.cli", "embed", str(tmp_path / "hanging.jsonl")]
    command += ["--out", str(tmp_path / "out"), "--model", str(tiny_model)]
    done = subprocess.run(
        [*command, "--text-column", "text", "--stall-timeout", "2"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Timeout (0:00:02)!" in done.stderr
    assert not (tmp_path / "out" / "plan.json").exists()


def test_all_workers_dead_is_an_error_that_says_so(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """Their log is a directory: none goes on behind its first part, and none waits for another."""
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    shutil.rmtree(out / "_parts")
    (out / "log.jsonl").unlink()
    (out / "log.jsonl").mkdir()
    with pytest.raises(JobError, match=r"2\d of 25 parts are missing.*worker 1: exit code 1"):
        embed_corpus(corpus, out, **options(tiny_model), devices="cpu,cpu")
    (out / "log.jsonl").rmdir()
    embed_corpus(corpus, out, **options(tiny_model))
    assert files_of(out) == expected


def test_each_worker_of_a_machine_sees_one_gpu(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process does not see it cannot open a context on."""
    started = []

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], env: dict[str, str], **rest: Any) -> None:
            started.append((command, env))
            super().__init__([sys.executable, "-c", ""], env=env, **rest)

    monkeypatch.setattr("gen_fast.jobs.engines.subprocess.Popen", Recorded)
    for visible, expected in ((None, ["2", "0"]), ("5,1, GPU-8f6b", ["GPU-8f6b", "5"])):
        started.clear()
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        out = tmp_path / f"out-{visible}"
        with pytest.raises(JobError, match="25 of 25 parts are missing"):
            embed_corpus(corpus, out, **options(tiny_model), devices="cuda:2,cuda:0")
        assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == expected
        for command, _ in started:
            assert command[command.index("--device") + 1] == "cuda"
    with pytest.raises(ConfigError, match="cuda:3 is not one of the 3 visible GPUs"):
        embed_corpus(corpus, tmp_path / "none", **options(tiny_model), devices="cuda:0,cuda:3")
    assert len(started) == 2


def test_a_process_that_was_given_a_gpu_makes_it_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for device in ("cpu", "cuda", "cuda:1"):
        make_current(device)
    assert current == [torch.device("cuda:1")]


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


def test_a_part_of_a_stopped_process_is_made_here_in_the_end(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """It has its claims and does nothing: after a stall_timeout they count for nothing."""
    out = tmp_path / "out"
    stopped = embed_in_process([corpus], out, options(tiny_model))
    while not (out / "log.jsonl").exists():
        time.sleep(0.01)
    os.kill(stopped.pid or 0, signal.SIGSTOP)
    try:
        embed_corpus(corpus, out, **options(tiny_model), devices="cpu", stall_timeout=3.0)
        assert files_of(out) == expected
    finally:
        stopped.kill()


# ---------------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "tell: "}, r"prompt was 'say: ', now it is 'tell: '"),
        ({"precision": "float16"}, r"precision was 'float32', now it is 'float16'"),
        ({"truncate_dim": 8}, r"truncate_dim was None, now it is 8"),
        ({"max_length": 20}, r"max_length was None, now it is 20"),
        ({"rows_per_part": 17}, r"rows_per_part was 16, now it is 17"),
        ({"method": "last-token"}, r"identity\.method was 'mean', now it is 'last-token'"),
        ({"text_column": "title"}, r"text_column was 'text', now it is 'title'"),
    ],
)
def test_a_plan_that_does_not_match_is_refused(
    corpus: Path, tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    before = files_of(out)
    with pytest.raises(JobError, match=message):
        embed_corpus(corpus, out, **options(tiny_model, **changes))
    assert files_of(out) == before


def test_another_model_and_a_changed_input_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 40)
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    from gen_fast.testing import save_tiny_model

    save_tiny_model(tmp_path / "other", "llama-tied", seed=1)
    with pytest.raises(JobError, match=r"identity\.backbone\.embedding_sha256"):
        embed_corpus(corpus, out, **options(tmp_path / "other"))
    os.utime(corpus)  # the same content: nothing has changed
    embed_corpus(corpus, out, **options(tiny_model))
    corpus.write_text(corpus.read_text().replace("text number 3", "text number 4"))
    with pytest.raises(JobError, match=r"a\.jsonl has changed"):
        embed_corpus(corpus, out, **options(tiny_model))
    corpus.unlink()
    with pytest.raises((JobError, InputError), match=r"a\.jsonl"):
        embed_corpus(corpus, out, **options(tiny_model))


def test_inputs_are_added_behind_those_there_are(tiny_model: Path, tmp_path: Path) -> None:
    """What was embedded before stays as it is, and its ids come first."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_corpus(folder / "b.jsonl", 40)
    out = tmp_path / "out"
    embed_corpus(folder, out, **options(tiny_model))
    before = files_of(out)
    write_corpus(folder / "a.jsonl", 50, first=20)  # 20 of its ids are taken
    with pytest.raises(JobError, match=r"a\.jsonl is a new input \(--append adds it\)"):
        embed_corpus(folder, out, **options(tiny_model))
    summary = embed_corpus(folder, out, **options(tiny_model), append=True)
    assert summary is not None
    assert summary.rejected_by_kind["duplicate id"] == 20
    after = files_of(out)
    assert {name: after[name] for name in before if name.startswith("part")} == {
        name: content for name, content in before.items() if name.startswith("part")
    }
    assert verify(out) == []
    # The same command goes on without --append, and so does adding nothing.
    assert embed_corpus(folder, out, **options(tiny_model)) == summary
    assert embed_corpus(folder, out, **options(tiny_model), append=True) == summary


def test_until_there_is_a_part_settings_can_be_mended(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"id": "", "title": "a", "body": "b"}, {"id": "x", "title": "c", "body": "d"}]
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = options(tiny_model, text_column=None, id_column="id", prompt="x" * 600)
    with pytest.raises(InputError, match="several columns hold strings"):
        embed_corpus(corpus, tmp_path / "out", **settings)
    settings["text_column"] = "body"
    with pytest.raises(PromptError, match="leaves no room"):
        embed_corpus(corpus, tmp_path / "out", **settings)
    settings["prompt"] = ""
    summary = embed_corpus(corpus, tmp_path / "out", **settings)
    assert summary is not None
    assert summary.rejected_by_kind == {"missing id": 1}


def test_files_of_jobs_are_no_input(tiny_model: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", 20)
    settings = options(tiny_model)
    first = embed_corpus(tmp_path, tmp_path / "out", **settings)
    assert embed_corpus(tmp_path, tmp_path / "out", **settings, append=True) == first
    assert embed_corpus(tmp_path, tmp_path / "other", **settings) == first
    assert embed_corpus(f"{tmp_path}/**/*.*l*", tmp_path / "glob", **settings) == first
    # A job above the directory, or one that is given itself, hides nothing.
    (tmp_path / "sub").mkdir()
    write_corpus(tmp_path / "sub" / "b.jsonl", 20)
    embed_corpus(tmp_path / "a.jsonl", tmp_path, **settings)
    assert embed_corpus(tmp_path / "sub", tmp_path.with_name("below"), **settings) == first
    found = list_sources([f"{tmp_path}/out/*.parquet"], tmp_path / "new")
    assert found == [str(path) for path in sorted((tmp_path / "out").glob("part-*"))]


def test_a_plan_alone(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert embed_corpus(corpus, out, **options(tiny_model), plan_only=True) is None
    planned = (out / "plan.json").read_bytes()
    assert not list(out.glob("part-*"))
    embed_corpus(corpus, out, **options(tiny_model))
    assert (out / "plan.json").read_bytes() == planned


def test_planning_gives_signs_of_life(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While ids are sorted, and while the records and files of parts are read."""
    signs = []
    monkeypatch.setattr(Watchdog, "heartbeat", lambda self: signs.append(1))
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model), plan_only=True)
    assert len(signs) > 100  # 256 buckets, of which few are empty
    embed_corpus(corpus, out, **options(tiny_model))
    signs.clear()
    embed_corpus(corpus, out, **options(tiny_model), plan_only=True)
    assert len(signs) > 3 * 25  # each part: its record, its file, its rejected rows


def test_texts_without_a_token_are_rejected(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the method can tell: here it finds nothing of its own in every tenth text."""
    from gen_fast.embed import layouts

    layout = layouts.OwnTokens.__call__

    def picky(self: layouts.OwnTokens, texts: list[str], first_row: int) -> layouts.Sequences:
        bad = tuple(first_row + i for i, text in enumerate(texts) if "number 20 " in text)
        if bad:
            raise TextError(f"row {bad[0]} has no token of its own", bad)
        return layout(self, texts, first_row)

    monkeypatch.setattr(layouts.OwnTokens, "__call__", picky)
    corpus = write_corpus(tmp_path / "a.jsonl", 60)
    summary = embed_corpus(corpus, tmp_path / "out", **options(tiny_model))
    assert summary is not None
    assert summary.rejected_by_kind["no token"] == 1
    assert summary.rows == 60 - 3
    assert verify(tmp_path / "out") == []


def test_formats_directories_globs_and_templates(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    rows = [{"key": f"{i}", "title": f"t{i}", "year": i, "text": f"x{i}"} for i in range(30)]
    content = "".join(json.dumps(row) + "\n" for row in rows[:10])
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    csv = "key,title,year,text\n" + "".join(
        f"{row['key']},{row['title']},{row['year']},{row['text']}\n" for row in rows[10:20]
    )
    (folder / "b.csv").write_text(csv)
    pq.write_table(pa.Table.from_pylist(rows[20:]), folder / "sub" / "c.parquet")
    (folder / "_d.jsonl").write_text("{}\n")
    (folder / "notes.md").write_text("nothing")
    settings = options(tiny_model, text_column=None, template="{title} of {year}:\n{text}")
    settings["rows_per_part"] = 4
    embed_corpus(folder, tmp_path / "out", **settings)
    assert verify(tmp_path / "out") == []
    read = [read_embeddings(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [i for part in read for i in part.ids] == [row["key"] for row in rows]
    texts = [f"{row['title']} of {row['year']}:\n{row['text']}" for row in rows]
    alone = gen_fast.load(tiny_model, dtype="float32", device="cpu").encode(texts, prompt="say: ")
    vectors = np.concatenate([part.vectors for part in read])
    np.testing.assert_allclose(vectors, alone, rtol=1e-4, atol=1e-5)

    embed_corpus(f"{folder}/**/*.parquet", tmp_path / "glob", **settings)
    assert len(list((tmp_path / "glob").glob("*.parquet"))) == 3
    for wrong, message in [
        ("{titel}", "no column 'titel'"),
        ("{title.__class__}", "not the name of a column"),
        ("{0", "expected '}'"),
        ("title", "names no column"),
    ]:
        with pytest.raises((ConfigError, InputError), match=message):
            embed_corpus(folder, tmp_path / "wrong", **{**settings, "template": wrong})


def test_columns_with_prompts_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 60)
    settings = options(tiny_model)
    del settings["prompt"], settings["text_column"]
    prompts = {"title": "query", "text": "document"}
    # Beside their own input: neither job takes the parts of the other for some.
    summaries = embed_columns(tmp_path, tmp_path / "out", prompts, **settings)
    assert [summary and summary.rows for summary in summaries.values()] == [60, 58]
    for column, name in prompts.items():
        alone = tmp_path / f"{column} alone"
        embed_corpus(corpus, alone, **settings, text_column=column, prompt_name=name)
        assert files_of(tmp_path / "out" / column) == files_of(alone)
    assert embed_columns(tmp_path, tmp_path / "out", prompts, **settings) == summaries
    for columns in ({"../x": None}, {"n\0": None}, {"_x": None}):
        with pytest.raises(ConfigError, match="cannot name a directory"):
            embed_columns(corpus, tmp_path / "out", columns, **settings)
    with pytest.raises(ConfigError, match="no columns"):
        embed_columns(corpus, tmp_path / "out", {}, **settings)
    # What is wrong with the last column keeps the first from being embedded.
    with pytest.raises(PromptError, match="no prompt named 'documnet'"):
        embed_columns(corpus, tmp_path / "w", {"title": "query", "text": "documnet"}, **settings)
    assert not list((tmp_path / "w").rglob("part-*"))
    with pytest.raises(ConfigError, match="template is not for several"):
        embed_columns(corpus, tmp_path / "out", prompts, **settings, template="{title}")
    with pytest.raises(JobError, match="holds a job of one text a row"):
        embed_columns(corpus, alone, prompts, **settings)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "ubinary"])
def test_precisions_and_dimensions(
    corpus: Path, tiny_model: Path, tmp_path: Path, precision: Any
) -> None:
    from gen_fast.search.exact import nearest

    out = tmp_path / "out"
    settings = options(tiny_model, precision=precision, truncate_dim=40)
    embed_corpus(corpus, out, **settings, normalize_embeddings=True)
    assert verify(out) == []
    store = PartStore(out, Plan.load(out))
    stored = np.concatenate([store.embeddings(part) for part in store.plan.parts])
    texts = [r["text"] for i, r in enumerate(lines_of(corpus)) if i % 50 != 7]
    exact = gen_fast.load(tiny_model, dtype="float32", device="cpu").encode(
        texts, prompt="say: ", truncate_dim=40, normalize_embeddings=True
    )
    assert isinstance(exact, np.ndarray)
    if precision == "ubinary":
        np.testing.assert_array_equal(stored, np.where(exact > 0, 1, -1))
    else:
        bound = {"float32": 1e-5, "float16": 1e-3, "int8": np.abs(exact).max() / 250}[precision]
        assert np.abs(stored - exact).max() <= bound
        assert (nearest(stored, exact, 1)[0] > 0.999).all()


# ---------------------------------------------------------------------- faults


def test_strict_stops_at_a_bad_row(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    for devices in (None, "cpu,cpu"):
        with pytest.raises((InputError, JobError), match=r"line 8: empty|exit code 1"):
            embed_corpus(
                corpus, tmp_path / f"out{devices}", **options(tiny_model), strict=True,
                devices=devices,
            )  # fmt: skip


def test_bad_rows_of_every_format(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe\n\na\0b\n" + b"x" * 2000 + b"\ngood\n")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "good"}\n{"text": \n["good"]\n{"text": "\\ud800"}\n'
    )
    settings = options(tiny_model, id_column=None, text_column=None, max_text_bytes=1000)
    summary = embed_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "o", **settings)
    assert summary is not None
    assert summary.rows == 3
    assert summary.rejected_by_kind == {
        "NUL character": 1, "empty": 1, "too long": 1, "unreadable": 4,
    }  # fmt: skip
    read = [read_embeddings(path).ids for path in sorted((tmp_path / "o").glob("*.parquet"))]
    assert read == [["0", "5"], ["6"]], "rows are numbered over the job"


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


def test_unreadable_inputs(tiny_model: Path, tmp_path: Path) -> None:
    settings = options(tiny_model)
    for name, content, message in [
        ("none.jsonl", None, "no such file"),
        ("a.parquet", b"PAR1 but not really", "arquet"),
        ("a.doc", b"text", "names no format"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:-9], "cannot be read"),
    ]:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            embed_corpus(path, tmp_path / "out", **settings)
        assert not (tmp_path / "out" / "plan.json").exists()


def test_damage_is_found_named_and_mended(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    settings = options(tiny_model)
    embed_corpus(corpus, out, **settings)
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
    embed_corpus(corpus, out, **settings)
    assert verify(out) == []
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(manifest.replace('"rows": 392', '"rows": 393'))
    assert len(verify(out)) == 1
    embed_corpus(corpus, out, **settings)
    assert files_of(out) == expected
    assert verify(out) == []


def test_the_command(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from gen_fast.cli import app

    def run(*arguments: object) -> Any:
        model = ["--model", tiny_model, "--dtype", "float32"]
        return CliRunner().invoke(app, [str(a) for a in ("embed", corpus, *model, *arguments)])

    columns = ["--text-column", "text", "--id-column", "key"]
    done = run("--out", tmp_path / "out", *columns, "--normalize", "--precision", "int8")
    assert done.exit_code == 0, done.stderr
    assert "392 embeddings in 1 parts; 8 rows rejected (2 NUL character, 1 duplicate" in done.stderr
    assert done.stdout == ""
    for arguments, code, message in [
        ([*columns], 1, "precision was 'int8', now it is 'float32'"),
        (["--truncate-dim", 99], 2, "outside 1…48"),
        (["--template", "{a", "--id-column", "key"], 2, "template"),
        (["--text-column", "text", "--template", "{a}"], 2, "not both"),
        (["--devices", "cpu,tpu9"], 2, "device 'tpu9'"),
        (["--prompt-name", "answer"], 2, "no prompt named 'answer'"),
        (["--text-column", "text", "--text-column", "text"], 2, "each --text-column once"),
        (["--prompt-name", "query", "--prompt-name", "document"], 2, "one --prompt-name for all"),
        (["--text-column", "a", "--text-column", "b", "--prompt", "x"], 2, "by --prompt-name"),
    ]:
        failed = run("--out", tmp_path / "out", *arguments)
        assert failed.exit_code == code, (arguments, failed.stderr, failed.exception)
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1

    two = ["--text-column", "title", "--text-column", "text", "--id-column", "key"]
    done = run("--out", tmp_path / "two", *two, "--prompt-name", "query")
    assert done.exit_code == 0, done.stderr
    assert [line.split(";")[0] for line in done.stderr.splitlines()] == [
        "title: 398 embeddings in 1 parts",
        "text: 392 embeddings in 1 parts",
    ]
    assert verify(tmp_path / "two" / "text") == []
