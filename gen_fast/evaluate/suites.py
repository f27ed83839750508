"""Collections of tasks by name, each with the settings that its figures are published under."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mteb
from mteb import AbsTask

from gen_fast.errors import ConfigError
from gen_fast.evaluate.advbench_ir import AdvBenchIR
from gen_fast.evaluate.choices import SUITES
from gen_fast.evaluate.local_tasks import LOCAL_TASKS

_OWN = (*LOCAL_TASKS, AdvBenchIR)
# Of our own tasks, which mteb cannot look up.
TYPES = {task.metadata.name: task.metadata.type for task in _OWN}


@dataclass(frozen=True)
class Suite:
    """Tasks that are run under the same settings.

    max_length: tokens of a text, instruction and special tokens included; None is the model's own.
    similarity: "cosine" or "dot"; None is the model's own.
    """

    tasks: Sequence[AbsTask]
    max_length: int | None
    similarity: str | None


def _local() -> Suite:
    return Suite([task() for task in LOCAL_TASKS], 512, "cosine")


def _mteb() -> Suite:
    return Suite(list(mteb.get_benchmark("MTEB(eng, v2)").tasks), 512, "cosine")


def _bright() -> Suite:
    """The twelve tasks of short documents; a question's list leaves out what it excludes."""
    tasks = mteb.get_benchmark("BRIGHT(v1.1)").tasks
    return Suite([task for task in tasks if "Long" not in task.metadata.name], 4096, "cosine")


def _advbench_ir() -> Suite:
    return Suite([AdvBenchIR()], 512, "dot")


_MAKERS: dict[str, Callable[[], Suite]] = dict(
    zip(SUITES, (_local, _mteb, _bright, _advbench_ir), strict=True)
)


def suites_of(names: Sequence[str]) -> list[Suite]:
    """What `names` stand for: suites, or single tasks, of these or any other of mteb's.

    A task of a suite keeps its settings; another one of mteb's is run with the model's own. Raises
    ConfigError.
    """
    return [_MAKERS[name]() if name in _MAKERS else _single(name) for name in names]


def _single(name: str) -> Suite:
    for maker in _MAKERS.values():
        suite = maker()
        tasks = [task for task in suite.tasks if task.metadata.name == name]
        if tasks:
            return replace(suite, tasks=tasks)
    try:
        return Suite([mteb.get_task(name)], None, None)
    except KeyError as error:
        raise ConfigError(
            f"no task named {name!r}: there are {', '.join((*SUITES, *TYPES))}, and mteb's"
        ) from error
