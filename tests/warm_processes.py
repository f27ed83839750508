"""Processes that start in milliseconds: forked from a server that has imported what they need."""

import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory

processes = multiprocessing.get_context("forkserver")
# It imports and runs nothing: no thread of torch's, no lock that a child would find taken.
processes.set_forkserver_preload(
    [
        "gen_fast.jobs.job",
        "transformers",
        "torch._dynamo",  # the optimizers import it
        "gen_fast.training.llm2vec_gen",
        "gen_fast.training.llm2vec",
        "gen_fast.training.gem",
    ]
)


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
