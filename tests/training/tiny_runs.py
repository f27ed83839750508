"""Runs of a few steps over a tiny model: settings, processes, and what they leave."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.distributed import TCPStore
from warm_processes import processes

from gen_fast.training.records import read_records

# Of LoRA over texts: stopped and continued within four steps.
ADAPTED = {
    "dtype": "float32",
    "device": "cpu",
    "max_length": 24,
    "lora_rank": 4,
    "batch_size": 6,
    "steps": 4,
    "schedule_steps": 20,
    "learning_rate": 1e-3,
    "validation_rows": 8,
    "validate_every": 2,
    "checkpoint_every": 1,
    "log_every": 1,
    "report_to": (),
}


def losses(config):
    """The total loss by step."""
    rows = read_records(Path(config.out) / "metrics.jsonl")
    return {row["step"]: row["loss/total"] for row in rows if "loss/total" in row}


def begin(train, config) -> BaseProcess:
    """Begin train(config) in a process of its own."""
    process = processes.Process(target=_train, args=(train, config, {}))
    process.start()
    return process


@contextmanager
def ranks_of(train, config) -> Iterator[list[BaseProcess]]:
    """Two processes begin train(config), and find each other as those of torchrun do."""
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
        process = processes.Process(target=_train, args=(train, config, environment))
        process.start()
        running.append(process)
    yield running
    for process in running:
        process.join(timeout=300)


def run_in_ranks(train, config) -> None:
    """train(config) in two ranks, to its end."""
    with ranks_of(train, config) as ranks:
        pass
    assert [rank.exitcode for rank in ranks] == [0, 0]


def _train(train, config, environment) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    train(config, show_progress_bar=False)
