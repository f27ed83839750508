"""The processes of a job: of this machine, of torchrun, of Ray; dead ones, and ones that hang."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import (
    embed_in_process,
    files_of,
    options,
)
from warm_processes import ranks, run_program

from gen_fast.errors import ConfigError, JobError
from gen_fast.jobs.engines import Engine, Run, _wait_for_cluster, run_ray, worker_environment
from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Plan
from gen_fast.model.device import make_current


def test_two_processes_of_this_machine(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    embed_corpus(corpus, tmp_path / "out", **options(tiny_model), devices="cpu,cpu")
    assert files_of(tmp_path / "out") == expected


def test_two_processes_of_torchrun(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Several jobs, one after the other in each process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "gen_fast.cli", "embed", str(corpus), "--quiet"]
    command += ["--model", str(tiny_model), "--dtype", "float32", "--text-column", "text"]
    command += ["--id-column", "key", "--rows-per-part", "16", "--out", str(tmp_path / "out")]
    command += ["--text-column", "title", "--prompt-name", "query"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for column in ("text", "title"):
        alone = options(tiny_model, text_column=column, prompt=None, prompt_name="query")
        embed_corpus(corpus, tmp_path / column, **alone)
        assert files_of(tmp_path / "out" / column) == files_of(tmp_path / column)


def test_what_the_first_rank_refuses_all_refuse(
    corpus: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    with ranks(refused, corpus, out, options(tiny_model, max_length=64)):
        pass
    first, second = (Path(f"{out}-{rank}").read_text() for rank in range(2))
    assert "max_length was None, now it is 64" in first
    assert second == f"rank 0 could not plan the job: {first}"


def refused(corpus: Path, out: Path, settings: dict[str, Any]) -> None:
    """In each rank: writes why."""
    with pytest.raises(JobError) as refusal:
        embed_corpus(corpus, out, **settings)
    Path(f"{out}-{os.environ['RANK']}").write_text(str(refusal.value))


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
    planned = (out / "plan.json").read_bytes()
    fifo = replace(plan.inputs[0], path=str(hanging), size=0)
    replace(plan, inputs=(fifo,)).save(out)
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
    (out / "plan.json").write_bytes(planned)
    embed_corpus(corpus, out, **options(tiny_model))
    assert files_of(out) == expected


def test_a_plan_that_hangs_ends_the_process(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time, gen_fast.jobs.job as job\n"
        "job.prepare = lambda *given, **options: time.sleep(60)\n"
        "corpus, out, model = sys.argv[1:]\n"
        "job.embed_corpus(corpus, out, model=model, text_column='text', stall_timeout=2)\n"
    )
    done = run_program(program, corpus, tmp_path / "out", tiny_model, check=False)
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


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """As torch would see them; the list is of those that this process makes its current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(
    ("visible", "seen"),
    [(None, ["0", "1", "2", "3"]), ("7,GPU-8f6b,5,1", ["7", "GPU-8f6b", "5", "1"])],
)
def test_all_devices_are_workers_that_see_one_gpu_each(
    visible: str | None,
    seen: list[str],
    four_gpus: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices = Engine.choose("all", "local").devices
    environments = [worker_environment(devices, index) for index in range(len(devices))]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == seen
    assert Engine.choose(None, "local").devices == ("cuda",)
    assert Engine.choose("3", "local").devices == ("cuda:0", "cuda:1", "cuda:2")
    with pytest.raises(ConfigError, match="5 devices are asked for, and there are 4"):
        Engine.choose(5, "local")


def test_each_process_of_torchrun_works_on_its_own_gpu(
    corpus: Path,
    tiny_model: Path,
    tmp_path: Path,
    four_gpus: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worked = []
    monkeypatch.setattr("gen_fast.jobs.job._work", lambda run, device, *rank: worked.append(device))
    arguments = {**options(tiny_model), "out": tmp_path / "out", "stall_timeout": 60.0}
    embed_corpus(corpus, plan_only=True, **arguments)
    for name, value in {"WORLD_SIZE": "8", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    for rank in range(1, 8):  # of two machines; the first, which plans, is not needed here
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 4))
        monkeypatch.setattr(
            "gen_fast.jobs.job.torchrun_ranks", lambda rank=rank: (rank, 8, nullcontext())
        )
        embed_corpus(corpus, **arguments)
    assert worked == [f"cuda:{rank % 4}" for rank in range(1, 8)]
    assert [device.index for device in four_gpus] == [rank % 4 for rank in range(1, 8)]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ConfigError, match="process 5 of this machine, which has 4 GPUs"):
        embed_corpus(corpus, **arguments)


def test_actors_of_ray(
    corpus: Path, tiny_model: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """On one cluster, which takes seconds to start, and is told of GPUs."""
    import ray

    ray.init(num_cpus=2, num_gpus=2, log_to_driver=False, include_dashboard=False)
    try:
        with pytest.raises(JobError, match="has had no NPU for 1 seconds"):
            _wait_for_cluster("NPU", 1, 1)
        # More than the cluster has: it begins with the two that there are.
        out = tmp_path / "out"
        embed_corpus(corpus, out, **options(tiny_model), engine="ray", devices=25)
        assert files_of(out) == expected
        check_that_each_actor_sees_one_gpu(corpus, tiny_model, tmp_path)
    finally:
        ray.shutdown()


def check_that_each_actor_sees_one_gpu(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Ray hides all but one from an actor."""
    out, seen = tmp_path / "gpus", tmp_path / "seen"
    seen.mkdir()
    embed_corpus(corpus, out, **options(tiny_model), plan_only=True)

    class Recorded:
        def __init__(self, device: str, **rest: Any) -> None:
            self._seen = f"{device} {os.environ['CUDA_VISIBLE_DEVICES']}"

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            (seen / self._seen).touch()
            deadline = time.monotonic() + 60
            while len(list(seen.iterdir())) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)  # until the other one has a part too
            return batch

    run = Run(out, Plan.load(out), Engine("ray", ("cuda:0", "cuda:1")), False, 60.0, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gen_fast.jobs.engines._RayWorker", Recorded)
        with pytest.raises(JobError, match="25 of 25 parts are missing"):
            run_ray(run)
    assert sorted(path.name for path in seen.iterdir()) == ["cuda 0", "cuda 1"]
