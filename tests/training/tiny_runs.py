"""Runs of a few steps over a tiny model: settings, processes, and what they leave."""

import time
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from warm_processes import processes, ranks

from gen_fast.training import world
from gen_fast.training.checkpoint import latest_checkpoint
from gen_fast.training.gem_config import GEMConfig
from gen_fast.training.records import read_records

WORDS = "a seal swims under the ice while birds look for fish near the shore".split()  # noqa: SIM905

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


def gem_configs(directory, model):
    """What makes configurations of GEM from settings, over texts in a directory."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, int(rng.integers(3, 12)))) for _ in range(60)]
    (directory / "texts.txt").write_text("\n".join([*texts, "", "a"]) + "\n")

    def make(out="run", **settings):
        values = {
            **ADAPTED,
            "texts": (str(directory / "texts.txt"),),
            "out": str(directory / out),
            "backbone": str(model),
            "n_special": 2,
            "alpha_start_step": 1,
        }
        if settings.get("full"):
            values.pop("lora_rank")
        return GEMConfig(**(values | settings))

    return make


def has_come_to(step, config) -> bool:
    """Whether a run has left its checkpoint of a step, or a later one."""
    latest = latest_checkpoint(Path(config.out) / "checkpoints")
    return latest is not None and latest.name >= f"step-{step:08d}"


def kill_past(step, train, config) -> None:
    """Kill train(config), in a process of its own, once the checkpoint of a step is written."""
    process = processes.Process(target=_train, args=(train, config))
    process.start()
    while not has_come_to(step, config):
        assert process.is_alive(), process.exitcode
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (Path(config.out) / "adapter").exists()


def ranks_of(train, config) -> AbstractContextManager[list[BaseProcess]]:
    """Two processes begin train(config)."""
    return ranks(_train, train, config)


def run_in_ranks(train, config) -> None:
    """train(config) in two ranks, to its end."""
    with ranks_of(train, config) as ranks:
        pass
    assert [rank.exitcode for rank in ranks] == [0, 0]


def _train(train, config) -> None:
    torch.set_num_threads(1)
    world._MESSAGE = 50_000  # several for the gradients of a tiny model
    train(config, show_progress_bar=False)
