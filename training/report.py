"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases, a progress bar and curves."""

import importlib.util
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gen_fast.errors import ConfigError
from gen_fast.io.durable import write_whole
from gen_fast.training.config import RunConfig
from gen_fast.training.records import cut_torn_line, read_records

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class Report:
    """Writes a run's figures. Only rank 0 has one that does anything."""

    def __init__(self, config: RunConfig, first_step: int, active: bool, bar: bool | None) -> None:
        self._path = Path(config.out) / METRICS
        self._active = active
        self._writers: list[Any] = []
        shown = sys.stderr.isatty() if bar is None else bar
        self._bar = tqdm(
            total=config.steps,
            initial=first_step,
            unit="step",
            disable=not (shown and active),
            dynamic_ncols=True,
        )
        if not active:
            return
        # What was written after the checkpoint that the run goes on from is written again.
        cut_torn_line(self._path)
        kept = [row for row in read_records(self._path) if row["step"] <= first_step]
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        for name in config.report_to:
            self._writers += _writer(name, config)

    def step(self, step: int, figures: Mapping[str, float], write: bool) -> None:
        """Show the figures of step `step` (from 1), and record them if `write`."""
        self._bar.set_postfix(
            **{
                name.removeprefix("loss/"): f"{value:.4f}"
                for name, value in figures.items()
                if name.startswith("loss/") and value
            },
            tok_s=f"{figures['speed/tokens_per_second']:.0f}",
            mfu=f"{figures['speed/mfu']:.2f}",
            refresh=False,
        )
        self._bar.update(1)
        if write:
            self.record(step, figures)

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Record figures of step `step`."""
        if not self._active:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        for write in self._writers:
            write(step, figures)

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()


def hidden(show_progress_bar: bool | None) -> bool | None:
    """What tqdm calls `disable`: None follows the terminal."""
    return None if show_progress_bar is None else not show_progress_bar


def _writer(name: str, config: RunConfig) -> list[Any]:
    """A function (step, figures) -> None; none if the package is not installed, which is logged."""
    if name not in ("tensorboard", "wandb"):
        raise ConfigError(f"report_to {name!r} is not tensorboard or wandb")
    if importlib.util.find_spec(name) is None:
        logger.warning("%s is not installed: its log is not written (pip install %s)", name, name)
        return []
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(Path(config.out) / "tensorboard")

        def to_board(step: int, figures: Mapping[str, float]) -> None:
            for key, value in figures.items():
                board.add_scalar(key, value, step)
            board.flush()

        return [to_board]
    import wandb

    run = wandb.init(project="gen_fast", dir=config.out, config=config.identity(), resume="allow")
    return [lambda step, figures: run.log(dict(figures), step=step)]


def append_record(folder: Path, step: int, name: str, figures: Mapping[str, float]) -> None:
    """Add the figures of something that is not a step, as "<name>/<figure>"."""
    row = {"step": step, **{f"{name}/{key}": value for key, value in figures.items()}}
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(row) + "\n")


Panel = tuple[str, Sequence[str], str]
"""Title, names of figures, and their unit."""


def draw_curves(folder: Path, target: Path, panels: Sequence[Panel]) -> None:
    """Plot figures of metrics.jsonl to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_records(folder / METRICS)
    size = 4.3 * len(panels), 3.6
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, constrained_layout=True, squeeze=False
    )
    for axis, (title, names, unit) in zip(axes[0], panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                faint = name.startswith("loss/")
                axis.plot(*zip(*points, strict=True), label=name, alpha=0.5 if faint else 1.0)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(unit)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def summary(folder: Path) -> Sequence[tuple[str, float]]:
    """The last validation figures of a run, after refitting if it was asked for."""
    kinds = ("validation/", "refit/")
    rows = [r for r in read_records(folder / METRICS) if any(n.startswith(kinds) for n in r)]
    last = rows[-1] if rows else {}
    return [(name, value) for name, value in last.items() if name.startswith(kinds)]
