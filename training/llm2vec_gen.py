"""LLM2Vec-Gen as a task of the trainer: special tokens and projections over a frozen backbone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from gen_fast.embed.adapter import Adapter
from gen_fast.model.device import resolve_dtype
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Example, TrainingData
from gen_fast.training.fitting import fit_alignment
from gen_fast.training.records import Rejections, log_stops, stops
from gen_fast.training.report import append_record, draw_curves, summary
from gen_fast.training.step import accumulate
from gen_fast.training.student import Student
from gen_fast.training.task import Progress, Task
from gen_fast.training.trainer import run, run_device
from gen_fast.training.validation import validate
from gen_fast.training.world import World

CURVES = (
    ("reconstruction", ("loss/reconstruction", "validation/reconstruction"), "nats a token"),
    ("alignment", ("loss/alignment", "validation/alignment"), ""),
    ("validation", ("validation/cosine", "validation/top1", "validation/mrr"), ""),
)


def train(config: TrainConfig, *, show_progress_bar: bool | None = None) -> Path:
    """Train an adapter; return its directory, <out>/adapter. See trainer.run."""
    return run(config, lambda: LLM2VecGenTask.load(config), show_progress_bar=show_progress_bar)


class LLM2VecGenTask(Task[Example]):
    """A student and what it is trained on; data: None for steps alone."""

    config: TrainConfig
    parameters: Student

    def __init__(
        self, student: Student, config: TrainConfig, data: TrainingData | None = None
    ) -> None:
        self.backbone = student.backbone
        rate = config.base_learning_rate(self.backbone.config.family)
        self.config = replace(config, learning_rate=rate)
        self.parameters = student
        rejected = Path(config.out) / "rejected.jsonl"
        self.rejections = Rejections(rejected) if data is None else data.rejections
        self._data = data

    @classmethod
    def load(cls, config: TrainConfig) -> "LLM2VecGenTask":
        """The task with its data and backbone. Raises ConfigError, InputError, and as `resolve`."""
        source = resolve(config.backbone, config.backbone_revision)
        device = run_device(config)
        rejections = Rejections(Path(config.out) / "rejected.jsonl")
        data = TrainingData(config, load_tokenizer(source), rejections)
        if World().rank == 0:
            log_stops(Path(config.out), data.stopped, len(data.train))
        backbone = load_backbone(
            source,
            dtype=resolve_dtype(config.dtype, device),
            device=device,
            quantize=config.quantize,
        )
        head = load_head(source, backbone)
        student = Student(backbone, head, data.dimension, config, data.teacher_variance)
        return cls(student, config, data)

    @property
    def data(self) -> TrainingData:
        """What a whole run is trained on."""
        assert self._data is not None, "a task without data takes its examples from the caller"
        return self._data

    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """See Task."""
        config, student = self.config, self.parameters
        rate = config.base_learning_rate(self.backbone.config.family)
        return [
            ([student.special], rate),
            (
                list(student.reconstruction.parameters()),
                config.reconstruction_learning_rate or rate,
            ),
            (list(student.alignment.parameters()), config.alignment_learning_rate or rate),
        ]

    def identity(self) -> dict[str, Any]:
        """See Task."""
        dimension = self.parameters.alignment.out_features
        return {"teacher_dimension": dimension, "data": self.data.fingerprint()}

    def begin(self) -> None:
        """See Task."""
        if self.config.start == "fitted":
            fit_alignment(self.parameters, self._sample(self.config.start_rows))

    def _sample(self, rows: int) -> list[Example]:
        return self.data.examples(self.data.sample(rows))

    def examples(self, step: int, world: World) -> Sequence[Example]:
        """See Task."""
        examples = self.data.examples(self.data.step_rows(step))
        return world.share(examples, [len(e.query) + 2 * len(e.answer) for e in examples])

    def accumulate(self, examples: Sequence[Example], world: World) -> Progress:
        """See Task."""
        losses, work = accumulate(self.parameters, examples, self.config, world)
        return Progress(asdict(losses), work.tokens, work.flops(self.parameters))

    def validate(self) -> Mapping[str, float]:
        """See Task."""
        if not self.data.validation:
            return {}
        examples = self.data.examples(self.data.validation)
        return validate(self.parameters, examples, self.config).as_dict()

    def save(self, folder: Path) -> None:
        """See Task."""
        self.parameters.to_adapter(self.config).save(folder)

    def restore(self, folder: Path) -> None:
        """See Task."""
        self.parameters.load_adapter(Adapter.load(folder))

    def finish(self, folder: Path, step: int) -> None:
        """See Task. The alignment is fitted once more if the settings ask for it."""
        config, data, out = self.config, self.data, folder.parent
        if config.refit_rows:
            fit_alignment(self.parameters, self._sample(config.refit_rows))
            append_record(out, step, "refit", self.validate())
        self.save(folder)
        draw_curves(out, folder / "curves.png", CURVES)
        figures = "\n".join(f"- {name.split('/')[1]}: {value:.4f}" for name, value in summary(out))
        card = (folder / "README.md").read_text()
        card += f"""
Trained for {step} steps of {config.batch_size} texts with gen_fast; settings in
`training.yaml`. {stops(data.stopped, len(data.train))}, and have no end of text.

On {config.validation_rows} held-out queries (cosine, top-1 and mean reciprocal rank against the
teacher's vectors of their answers):

{figures}

![curves](curves.png)
"""
        (folder / "README.md").write_text(card)
        (folder / "training.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))
