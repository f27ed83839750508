"""The training loop: steps, validation, checkpoints, of any task."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from gen_fast.errors import ConfigError, NonFiniteLossError
from gen_fast.model.device import make_current, matmul_peak
from gen_fast.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from gen_fast.training.config import RunConfig
from gen_fast.training.report import Report
from gen_fast.training.task import Progress, Task
from gen_fast.training.world import World, distributed, processes_started

logger = logging.getLogger(__name__)


class Stepper:
    """A task with its optimizer and schedule: takes updates, one global batch each.

    AdamW; the learning rate rises linearly over the warm-up and falls to 0. taken counts steps; one
    whose loss or gradient is not finite changes nothing and is counted in skipped.
    """

    def __init__(self, task: Task[Any]) -> None:
        self.task = task
        self.config = task.config
        self.world = World()
        groups = task.groups()
        self._rates = [rate for _, rate in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(parameters)} for parameters, _ in groups],
            weight_decay=self.config.weight_decay,
        )
        self.taken = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self.progress = Progress({}, 0, 0.0)
        self.gradient_norm = 0.0

    @property
    def rate(self) -> float:
        """The first group's learning rate in the next update."""
        return self._rates[0] * self.scale()

    def scale(self) -> float:
        """What the learning rates are multiplied by in the next update."""
        return self._schedule() * self.task.rate_scale(self.taken)

    def _schedule(self) -> float:
        config, number = self.config, self.taken + 1
        if number <= config.warmup_steps:
            return number / config.warmup_steps
        steps = config.schedule_steps - config.warmup_steps
        left = max(0.0, (config.schedule_steps - self.taken) / steps)
        return left if config.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)

    def step(self, examples: Sequence[Any]) -> Mapping[str, float]:
        """One update from this rank's share of a global batch; its losses, the sum as "total".

        Raises NonFiniteLossError.
        """
        self.progress = self.task.accumulate(examples, self.world)
        losses = self.progress.losses
        norm = torch.nn.utils.clip_grad_norm_(
            self.task.parameters.parameters(), self.config.max_grad_norm
        )
        self.gradient_norm = float(norm)
        finite = bool(torch.isfinite(norm + losses["total"]))
        if finite:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self.scale()
            self.optimizer.step()
            self.task.constrain()
        self._count_skipped(finite, losses["total"])
        self.taken += 1
        return losses

    def _count_skipped(self, finite: bool, loss: float) -> None:
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if finite:
            return
        self.skipped += 1
        logger.warning(
            "step %d: loss %s, gradient norm %s: the step is skipped (%d so far)",
            self.taken + 1,
            loss,
            self.gradient_norm,
            self.skipped,
        )
        if self._skipped_in_a_row > self.config.max_skipped:
            raise NonFiniteLossError(
                f"the loss was not finite in {self._skipped_in_a_row} steps in a row, up to step "
                f"{self.taken + 1}; a lower learning_rate or dtype float32 may help"
            )

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by "<parameter>.<name>"."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.task.parameters.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def restore(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Go back to the checkpoint at `path`. Raises CheckpointError."""
        checkpoint = load_checkpoint(path, identity, self.task.restore)
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in checkpoint.optimizer.items():
            name, _, part = key.rpartition(".")
            by_parameter.setdefault(name, {})[part] = value
        for name, parameter in self.task.parameters.named_parameters():
            # The count of steps stays on the CPU, as torch keeps it.
            self.optimizer.state[parameter] = {
                part: value if part == "step" else value.to(parameter.device)
                for part, value in by_parameter.get(name, {}).items()
            }
        self.taken = checkpoint.step
        self.skipped = int(checkpoint.counters["skipped"])
        self._skipped_in_a_row = int(checkpoint.counters["skipped_in_a_row"])

    def save(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint to go on from into `folder`. Raises CheckpointError."""
        counters = {"skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}
        checkpoint = Checkpoint(self.taken, self.optimizer_tensors(), identity, counters)
        save_checkpoint(folder, checkpoint, self.task.save, self.config.keep_checkpoints)


def run(
    config: RunConfig, load: Callable[[], Task[Any]], *, show_progress_bar: bool | None = None
) -> Path:
    """Train what `load` gives; return its directory, <out>/adapter.

    A run that was interrupted goes on from the newest checkpoint in <out>/checkpoints, to the
    same bits as without the interruption. Under torchrun every rank calls this.

    Raises ConfigError, InputError, CheckpointError or NonFiniteLossError.
    """
    # Before they wait for each other: the last to come would only see that another one has gone.
    if config.batch_size < (count := processes_started()):
        raise ConfigError(f"batch_size {config.batch_size} is less than {count} processes")
    with distributed():
        out = Path(config.out)
        make_current(run_device(config))
        out.mkdir(parents=True, exist_ok=True)
        stepper = Stepper(load())
        _train(stepper, out, show_progress_bar)
        return out / "adapter"


def _train(stepper: Stepper, out: Path, show_progress_bar: bool | None) -> None:
    task, config, world = stepper.task, stepper.config, stepper.world
    identity = {
        **config.identity(),
        "dtype": str(task.backbone.dtype),
        "backbone": task.backbone.fingerprint,
        **task.identity(),
    }
    checkpoint = latest_checkpoint(out / "checkpoints")
    if checkpoint is not None:
        stepper.restore(checkpoint, identity)
        logger.warning("going on from %s", checkpoint)
    else:
        task.begin()
        world.copy_from_first(task.parameters.parameters())
    if world.rank == 0:
        task.rejections.write()
        (out / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))
    report = Report(config, stepper.taken, world.rank == 0, show_progress_bar)
    try:
        _loop(stepper, out, report, identity)
    finally:
        report.close()
    if 2 * stepper.skipped > stepper.taken:
        raise NonFiniteLossError(
            f"{stepper.skipped} of {stepper.taken} steps were skipped, because their loss or "
            f"gradient was not finite: no adapter is made of this; the last state is in "
            f"{out / 'checkpoints'}"
        )
    if world.rank == 0:
        task.finish(out / "adapter", stepper.taken)


@cache
def machine_peak(dtype: torch.dtype, device: torch.device) -> float:
    """matmul_peak, once a process: measuring it takes longer than many steps of a small model."""
    return matmul_peak(dtype, device)


def _loop(stepper: Stepper, out: Path, report: Report, identity: Mapping[str, Any]) -> None:
    task, config, world = stepper.task, stepper.config, stepper.world
    peak = machine_peak(task.backbone.dtype, task.backbone.device)
    while stepper.taken < config.steps:
        start = time.perf_counter()
        examples = task.examples(stepper.taken, world)
        rate = stepper.rate
        losses = stepper.step(examples)
        seconds = time.perf_counter() - start
        figures = {f"loss/{name}": value for name, value in losses.items()}
        figures |= {
            "optimizer/learning_rate": rate,
            "optimizer/gradient_norm": stepper.gradient_norm,
            "optimizer/skipped": stepper.skipped,
            "speed/tokens_per_second": stepper.progress.tokens / seconds,
            "speed/mfu": stepper.progress.flops / seconds / peak,
        }
        step = stepper.taken
        last = step == config.steps
        report.step(step, figures, write=step % config.log_every == 0 or step == 1 or last)
        if world.rank == 0 and (step % config.validate_every == 0 or last):
            validation = task.validate()
            if validation:
                report.record(step, {f"validation/{k}": v for k, v in validation.items()})
        if world.rank == 0 and (step % config.checkpoint_every == 0 or last):
            stepper.save(out / "checkpoints", identity)


def run_device(config: RunConfig) -> torch.device:
    """Where a rank of a run computes."""
    if config.device is not None:
        return torch.device(config.device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
