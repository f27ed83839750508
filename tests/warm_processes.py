"""Processes that start in milliseconds: forked from a server that has imported what they need."""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory
from typing import Any


class _Process(ForkServerProcess):
    def run(self) -> None:
        gc.freeze()  # what was imported: the collector would look through all of it
        super().run()


class _Context(ForkServerContext):
    Process = _Process


processes = _Context()
# It imports and runs nothing: no thread of torch's, no lock that a child would find taken.
processes.set_forkserver_preload(
    [
        "gen_fast.jobs.job",
        "gen_fast.cli",
        "pandas",  # pyarrow imports it
        "transformers",
        "torch._dynamo",  # the optimizers import it
        "gen_fast.training.llm2vec_gen",
        "gen_fast.training.llm2vec",
        "gen_fast.training.gem",
    ]
)


@contextmanager
def ranks(run: Callable[..., None], *arguments: Any) -> Iterator[list[BaseProcess]]:
    """Two processes begin run(*arguments), and find each other as those of torchrun do."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=120))
    described = {
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    running = []
    for rank in range(2):
        environment = described | {"RANK": rank, "LOCAL_RANK": rank}
        process = processes.Process(target=_run_rank, args=(environment, run, arguments))
        process.start()
        running.append(process)
    yield running
    for process in running:
        process.join(timeout=300)


def _run_rank(
    environment: dict[str, object], run: Callable[..., None], arguments: Sequence[Any]
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    run(*arguments)


def run_program(
    program: str, *arguments: object, timeout: float = 300, check: bool = True
) -> CompletedProcess[str]:
    """As subprocess.run([sys.executable, "-c", program, *arguments]) with its output, but warm."""
    given = ["-c", *map(str, arguments)]
    with TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = processes.Process(target=_run, args=(program, given, *streams))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutExpired(given, timeout)
        done = CompletedProcess(given, process.exitcode or 0, *(s.read_text() for s in streams))
    if check:
        assert done.returncode == 0, done.stderr
    return done


def _run(program: str, arguments: list[str], stdout: Path, stderr: Path) -> None:
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = arguments
    exec(compile(program, "-c", "exec"), {"__name__": "__main__"})
