"""The training loop: data, steps, validation, checkpoints."""

import logging
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from gen_fast.errors import ConfigError, NonFiniteLossError
from gen_fast.model.backbone import Backbone
from gen_fast.model.device import make_current, matmul_peak, resolve_dtype
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Example, TrainingData, share_of_rank
from gen_fast.training.fitting import fit_alignment
from gen_fast.training.records import Rejections, log_stops, stops
from gen_fast.training.report import Report, append_record, draw_curves, summary
from gen_fast.training.step import Losses, Work, accumulate
from gen_fast.training.student import Student
from gen_fast.training.validation import validate
from gen_fast.training.world import World, distributed

logger = logging.getLogger(__name__)


class Stepper:
    """A student with its optimizer and schedule: takes updates, one global batch each.

    AdamW; the learning rate rises linearly over the warm-up and falls linearly to 0. taken counts
    steps; one whose loss or gradient is not finite changes nothing and is counted in skipped.
    config has the learning rate that is taken, also where the given one leaves it to the family.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Tensor,
        dimension: int,
        config: TrainConfig,
        teacher_variance: float = 1.0,
    ) -> None:
        self.rate = config.base_learning_rate(backbone.config.family)
        self.config = config = replace(config, learning_rate=self.rate)
        self.world = World()
        self.student = Student(backbone, head, dimension, config, teacher_variance)
        student = self.student
        self._rates = (
            self.rate,
            config.reconstruction_learning_rate or self.rate,
            config.alignment_learning_rate or self.rate,
        )
        groups = ([student.special], student.reconstruction, student.alignment)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group if isinstance(group, list) else list(group.parameters())}
                for group in groups
            ],
            weight_decay=config.weight_decay,
        )
        self.taken = 0
        self.skipped = 0
        self._skipped_in_a_row = 0
        self.work = Work(0, 0, 0, 0)
        self.gradient_norm = 0.0

    def schedule(self) -> float:
        """What the learning rates are multiplied by in the next update."""
        config, number = self.config, self.taken + 1
        if number <= config.warmup_steps:
            return number / config.warmup_steps
        left = config.schedule_steps - self.taken
        return max(0.0, left / (config.schedule_steps - config.warmup_steps))

    def step(self, examples: list[Example]) -> Losses:
        """One update from this rank's share of a global batch. Raises NonFiniteLossError."""
        losses, self.work = accumulate(self.student, examples, self.config, self.world)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.max_grad_norm)
        self.gradient_norm = float(norm)
        finite = bool(torch.isfinite(norm + losses.total))
        if finite:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self.schedule()
            self.optimizer.step()
        self._count_skipped(finite, losses)
        self.taken += 1
        return losses

    def _count_skipped(self, finite: bool, losses: Losses) -> None:
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if finite:
            return
        self.skipped += 1
        logger.warning(
            "step %d: loss %s, gradient norm %s: the step is skipped (%d so far)",
            self.taken + 1,
            losses.total,
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
            for name, parameter in self.student.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint."""
        self.student.load_adapter(checkpoint.adapter)
        for name, parameter in self.student.named_parameters():
            state = {
                key.removeprefix(f"{name}."): value
                for key, value in checkpoint.optimizer.items()
                if key.startswith(f"{name}.")
            }
            # The count of steps stays on the CPU, as torch keeps it.
            moved = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
            self.optimizer.state[parameter] = moved
        self.taken = checkpoint.step
        self.skipped = int(checkpoint.counters["skipped"])
        self._skipped_in_a_row = int(checkpoint.counters["skipped_in_a_row"])

    def checkpoint(self, identity: dict[str, Any]) -> Checkpoint:
        """The state to go on from."""
        counters = {"skipped": self.skipped, "skipped_in_a_row": self._skipped_in_a_row}
        adapter = self.student.to_adapter(self.config)
        return Checkpoint(self.taken, adapter, self.optimizer_tensors(), identity, counters)


def train(config: TrainConfig, *, show_progress_bar: bool | None = None) -> Path:
    """Train an adapter; return its directory, <out>/adapter.

    A run that was interrupted goes on from the newest checkpoint in <out>/checkpoints, to the
    same bits as without the interruption. Under torchrun every rank calls this.

    Raises ConfigError, InputError, CheckpointError or NonFiniteLossError.
    """
    with distributed():
        return _train(config, show_progress_bar)


def _train(config: TrainConfig, show_progress_bar: bool | None) -> Path:
    world = World()
    out = Path(config.out)
    if config.batch_size < world.size:
        raise ConfigError(f"batch_size {config.batch_size} is less than {world.size} processes")
    device = _device(config)
    make_current(device)
    source = resolve(config.backbone, config.backbone_revision)
    tokenizer = load_tokenizer(source)
    out.mkdir(parents=True, exist_ok=True)
    rejections = Rejections(out / "rejected.jsonl")
    data = TrainingData(config, tokenizer, rejections)
    backbone = load_backbone(source, dtype=resolve_dtype(config.dtype, device), device=device)
    head = load_head(source, backbone)
    stepper = Stepper(backbone, head, data.dimension, config, data.teacher_variance)
    config = stepper.config
    identity = {
        **config.identity(),
        "dtype": str(backbone.dtype),
        "backbone": backbone.fingerprint,
        "teacher_dimension": data.dimension,
        "data": data.fingerprint(),
    }
    checkpoint = latest_checkpoint(out / "checkpoints")
    if checkpoint is not None:
        stepper.restore(load_checkpoint(checkpoint, identity))
        logger.warning("going on from %s", checkpoint)
    elif config.start == "fitted":
        fit_alignment(stepper.student, data.examples(data.sample(config.start_rows)))
        world.copy_from_first(stepper.student.parameters())
    if world.rank == 0:
        rejections.write()
        log_stops(out, data.stopped, len(data.train))
        (out / "config.yaml").write_text(yaml.safe_dump(_plain(config), sort_keys=False))
    report = Report(config, stepper.taken, world.rank == 0, show_progress_bar)
    try:
        _loop(config, stepper, data, report, identity)
    finally:
        report.close()
    if world.rank == 0:
        _finish(config, stepper, data)
    return out / "adapter"


def _loop(
    config: TrainConfig,
    stepper: Stepper,
    data: TrainingData,
    report: Report,
    identity: dict[str, Any],
) -> None:
    world = stepper.world
    peak = matmul_peak(stepper.student.backbone.dtype, stepper.student.backbone.device)
    while stepper.taken < config.steps:
        start = time.perf_counter()
        rows = data.step_rows(stepper.taken)
        own = share_of_rank(data.examples(rows), world.rank, world.size)
        rate = stepper.rate * stepper.schedule()
        losses = stepper.step(own)
        seconds = time.perf_counter() - start
        figures = {f"loss/{name}": value for name, value in asdict(losses).items()}
        figures |= {
            "optimizer/learning_rate": rate,
            "optimizer/gradient_norm": stepper.gradient_norm,
            "optimizer/skipped": stepper.skipped,
            "speed/tokens_per_second": stepper.work.tokens / seconds,
            "speed/mfu": stepper.work.flops(stepper.student) / seconds / peak,
        }
        step = stepper.taken
        last = step == config.steps
        report.step(step, figures, write=step % config.log_every == 0 or step == 1 or last)
        if world.rank == 0 and data.validation and (step % config.validate_every == 0 or last):
            validation = validate(stepper.student, data.examples(data.validation), config)
            report.record(step, {f"validation/{k}": v for k, v in validation.as_dict().items()})
        if world.rank == 0 and (step % config.checkpoint_every == 0 or last):
            checkpoint = stepper.checkpoint(identity)
            save_checkpoint(Path(config.out) / "checkpoints", checkpoint, config.keep_checkpoints)


def _finish(config: TrainConfig, stepper: Stepper, data: TrainingData) -> None:
    """Write the adapter, its curves and its model card."""
    out = Path(config.out)
    if config.refit_rows:
        fit_alignment(stepper.student, data.examples(data.sample(config.refit_rows)))
        if data.validation:
            validation = validate(stepper.student, data.examples(data.validation), config)
            append_record(out, stepper.taken, "refit", validation.as_dict())
    folder = out / "adapter"
    stepper.student.to_adapter(config).save(folder)
    draw_curves(out, folder / "curves.png")
    figures = "\n".join(f"- {name.split('/')[1]}: {value:.4f}" for name, value in summary(out))
    card = (folder / "README.md").read_text()
    card += f"""
Trained for {stepper.taken} steps of {config.batch_size} texts with gen_fast; settings in
`training.yaml`. {stops(data.stopped, len(data.train))}, and have no end of text.

On {config.validation_rows} held-out queries (cosine, top-1 and mean reciprocal rank against the
teacher's vectors of their answers):

{figures}

![curves](curves.png)
"""
    (folder / "README.md").write_text(card)
    (folder / "training.yaml").write_text(yaml.safe_dump(_plain(config), sort_keys=False))


def _plain(config: TrainConfig) -> dict[str, Any]:
    values = asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _device(config: TrainConfig) -> torch.device:
    if config.device is not None:
        return torch.device(config.device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
