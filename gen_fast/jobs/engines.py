"""Ways to run the workers of a job: processes of this machine, torchrun, a Ray cluster."""

import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from gen_fast.errors import ConfigError, JobError
from gen_fast.jobs.choices import DEFAULT_STALL_TIMEOUT, ENGINES
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Part, Plan
from gen_fast.jobs.worker import Worker
from gen_fast.model.device import cpus

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_PLANNING = timedelta(days=1)
_plans = itertools.count()


@dataclass(frozen=True)
class Engine:
    """Where a job runs: "local" or "ray", and the devices, one a process."""

    name: str
    devices: tuple[str, ...]

    @classmethod
    def choose(cls, devices: str | int | Sequence[str] | None, name: str) -> "Engine":
        """Read `devices` as embed_corpus takes it. Raises ConfigError."""
        if name not in ENGINES:
            raise ConfigError(f"engine {name!r} is not {' or '.join(ENGINES)}")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        every = tuple(f"cuda:{i}" for i in range(gpus)) or ("cpu",)
        if devices is None:
            return cls(name, ("cuda" if gpus else "cpu",) if name == "local" else every[:1])
        if devices == "all":
            return cls(name, every)
        if isinstance(devices, int) or (isinstance(devices, str) and devices.isdigit()):
            count = int(devices)
            if count < 1 or (gpus and count > gpus and name == "local"):
                raise ConfigError(f"{count} devices are asked for, and there are {max(gpus, 1)}")
            return cls(name, every[:count] if gpus and name == "local" else (every[0],) * count)
        names = devices.split(",") if isinstance(devices, str) else list(devices)
        for device in names:
            try:
                torch.device(device)
            except RuntimeError as error:
                raise ConfigError(f"device {device!r}: {str(error).splitlines()[0]}") from error
        return cls(name, tuple(names))


@dataclass(frozen=True)
class Run:
    """A planned job, and how this call works on it (see embed_corpus). shown: a progress bar."""

    folder: Path
    plan: Plan
    engine: Engine
    strict: bool
    stall_timeout: float | None
    shown: bool


def run_local(run: Run) -> None:
    """Run a process a device until all parts are there.

    The parts of a process that ends go to the others. Raises JobError if all have ended and parts
    are missing.
    """
    devices = run.engine.devices
    count = len(devices)
    environments = [worker_environment(devices, index) for index in range(count)]
    command = [sys.executable, "-m", "gen_fast.jobs.worker", str(run.folder)]
    command += ["--count", str(count), *(["--strict"] if run.strict else [])]
    command += ["--stall-timeout", str(run.stall_timeout or DEFAULT_STALL_TIMEOUT)]
    workers = [
        # stdin is a pipe that closes when this process ends, and they with it.
        subprocess.Popen(
            [*command, "--device", torch.device(device).type, "--index", str(index)],
            env=environment,
            stdin=subprocess.PIPE,
        )
        for index, (device, environment) in enumerate(zip(devices, environments, strict=True))
    ]
    try:
        with progress(run) as refresh:
            while any(worker.poll() is None for worker in workers):
                refresh()
                time.sleep(_POLL_SECONDS)
                if run.strict and any(worker.poll() for worker in workers):
                    break
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    _check_complete(run, [f"worker {i}: {_ending(w)}" for i, w in enumerate(workers)])


def worker_environment(devices: Sequence[str], index: int) -> dict[str, str]:
    """The environment of the worker of `devices[index]`: it sees one GPU, or its share of the CPU.

    With one GPU visible a process cannot open a context on another one. The numbers are those of
    the GPUs that this process sees itself.
    """
    environment = dict(os.environ)
    if "cpu" in devices:
        environment["OMP_NUM_THREADS"] = str(max(1, cpus() // len(devices)))
    device = torch.device(devices[index])
    if device.type == "cuda":
        number = device.index or 0
        visible = [x.strip() for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
        if visible and number >= len(visible):
            raise ConfigError(f"device {device} is not one of the {len(visible)} visible GPUs")
        environment["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else str(number)
    return environment


def _ending(worker: "subprocess.Popen[bytes]") -> str:
    code = worker.returncode
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def _check_complete(run: Run, endings: Sequence[str]) -> None:
    missing = len(run.plan.parts) - sum(1 for _ in PartStore(run.folder, run.plan).finished())
    if missing:
        raise JobError(
            f"{run.folder}: {missing} of {len(run.plan.parts)} parts are missing, the others are "
            f"intact ({', '.join(endings)}); run again to go on"
        )


@contextmanager
def progress(run: Run) -> Iterator[Callable[[], None]]:
    """A bar over the finished parts of all processes, and a function that looks at them again."""
    store = PartStore(run.folder, run.plan)
    left = list(run.plan.parts)
    due = 0.0
    with tqdm(total=run.plan.rows, unit="text", disable=not run.shown) as bar:

        def refresh() -> None:
            nonlocal due, left
            started = time.monotonic()
            if started < due:
                return
            before, left = left, [part for part in left if store.record(part) is None]
            bar.update(sum(part.rows for part in before) - sum(part.rows for part in left))
            ended = time.monotonic()
            due = ended + max(1.0, 20 * (ended - started))  # looking must not cost what it shows

        if run.shown:
            refresh()
            bar.initial = bar.n  # the rate is that of this run
        yield refresh if run.shown else lambda: None
        due = 0.0
        if run.shown:
            refresh()


@cache
def _meeting() -> tuple[Any, int, int]:
    """The store of torchrun's processes, this one's rank, their number.

    Kept while the process lives: without torchrun's own store, rank 0 holds it for the others.
    """
    store, rank, count = next(rendezvous("env://"))
    store.set_timeout(_PLANNING)
    return store, rank, count


def torchrun_ranks() -> tuple[int, int, AbstractContextManager[None]]:
    """This process' rank, their number, and a context in which the first goes ahead.

    An error of the first rank in that context is an error of all.
    """
    store, rank, count = _meeting()
    key = f"gen_fast.plan.{next(_plans)}"  # all ranks plan the same jobs in the same order

    @contextmanager
    def first_ahead() -> Iterator[None]:
        if rank:
            answer = store.get(key).decode()
            if answer:
                raise JobError(f"rank 0 could not plan the job: {answer}")
            yield
            return
        try:
            yield
        except BaseException as error:
            store.set(key, str(error) or type(error).__name__)
            raise
        store.set(key, "")

    return rank, count, first_ahead()


# ---------------------------------------------------------------------- Ray


class _RayWorker:
    """An actor that makes the parts it is given."""

    def __init__(self, folder: str, device: str, strict: bool, stall_timeout: float) -> None:
        self._plan = Plan.load(Path(folder))
        encoder = self._plan.settings.load_encoder(device)
        self._worker = Worker(
            Path(folder), self._plan, encoder, strict=strict, stall_timeout=stall_timeout
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        self._worker.make([self._plan.parts[number] for number in batch["part"]])
        return batch


def run_ray(run: Run) -> None:
    """Run the missing parts through Ray Data on a pool of actors, one a device.

    The job's directory must be the same storage on every node. An actor that ends is started
    again, its part tried again, three times. With fewer devices in the cluster the job begins with
    those, and Ray starts more actors if it grows. Raises JobError, also if there is none for
    `stall_timeout`.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise JobError("engine ray needs Ray: pip install 'gen-fast[ray]'") from error
    store = PartStore(run.folder, run.plan)
    missing: list[Part] = [part for part in run.plan.parts if store.record(part) is None]
    if not missing:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    on_gpu = run.engine.devices[0].startswith("cuda")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A block a part. No other stage: on a small cluster the actors take every CPU there is.
    rows = ray.data.from_items(
        [{"part": part.number} for part in missing], override_num_blocks=len(missing)
    )
    patience = run.stall_timeout or DEFAULT_STALL_TIMEOUT
    count = min(len(run.engine.devices), len(missing))
    available = _wait_for_cluster("GPU" if on_gpu else "CPU", count, patience)
    batches = rows.map_batches(
        _RayWorker,
        fn_constructor_kwargs={
            "folder": str(run.folder.resolve()),
            "device": "cuda" if on_gpu else "cpu",
            "strict": run.strict,
            "stall_timeout": patience,
        },
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=available, max_size=count),
        num_gpus=1 if on_gpu else 0,
        num_cpus=1,
        max_restarts=3,
        max_task_retries=3,
    )
    try:
        with progress(run) as refresh:
            for _ in batches.iter_batches(batch_size=1):
                refresh()
    except ray.exceptions.RayError as error:
        _check_complete(run, [str(error).strip().splitlines()[-1]])
    _check_complete(run, ["Ray"])


def _wait_for_cluster(kind: str, count: int, patience: float) -> int:
    """How many of `count` CPUs or GPUs the Ray cluster has, once it has any.

    A cluster that has none is asked to grow: by the one standing request that a cluster keeps, and
    which whoever else makes one replaces. Ray itself would wait without a word. Raises JobError
    after `patience` seconds.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    available = int(ray.cluster_resources().get(kind, 0))
    if available < count:
        logger.warning("%d %ss are asked for, and the Ray cluster has %d", count, kind, available)
    if available:
        return min(available, count)
    deadline = time.monotonic() + patience
    request_resources(bundles=[{"CPU": 1, kind: 1}])
    try:
        while not available:
            if time.monotonic() > deadline:
                raise JobError(f"the Ray cluster has had no {kind} for {patience:g} seconds")
            time.sleep(_POLL_SECONDS)
            available = int(ray.cluster_resources().get(kind, 0))
    finally:
        request_resources(bundles=[])  # from now on the actors ask for themselves
    return min(available, count)
