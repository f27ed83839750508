"""What tasks have in common that train a backbone's linears over texts: data and files."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml
from torch import nn

from gen_fast.errors import ConfigError, InputError
from gen_fast.formats.llm2vec import Wrapper, read_checkpoint
from gen_fast.io.durable import replacing_directory
from gen_fast.io.text_files import read_texts
from gen_fast.model.backbone import Backbone
from gen_fast.model.choices import INT8
from gen_fast.model.device import resolve_dtype
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import Tokenizer, load_tokenizer
from gen_fast.model.weights import load_backbone
from gen_fast.training.adapted_config import AdaptedConfig
from gen_fast.training.data import smallest_hashes
from gen_fast.training.linears import AllWeights, LoraFactors, TrainedLinears
from gen_fast.training.records import Rejections
from gen_fast.training.report import draw_curves, summary
from gen_fast.training.task import Task
from gen_fast.training.trainer import run_device


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is held out. fingerprint: of both."""

    train: Sequence[Any]
    validation: Sequence[Any]
    fingerprint: str


class AdaptedTask(Task[Any]):
    """What is trained of the linears, and the files that it is written to.

    TAG: of the model card. linears: their update, all of `parameters` or a part of them.
    """

    TAG: ClassVar[str]
    config: AdaptedConfig
    linears: TrainedLinears

    def __init__(
        self,
        backbone: Backbone,
        config: AdaptedConfig,
        rejections: Rejections,
        data: Data,
    ) -> None:
        self.backbone = backbone
        self.config = config
        self.rejections = rejections
        self.linears = (LoraFactors if config.trains_lora else AllWeights)(config, backbone)
        self.parameters = self.linears.update
        self._data = data

    @property
    @abstractmethod
    def title(self) -> str:
        """What is trained, for the model card."""

    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """See Task."""
        assert self.config.learning_rate is not None
        return [(list(self.parameters.parameters()), self.config.learning_rate)]

    def identity(self) -> dict[str, Any]:
        """See Task."""
        return {"data": self._data.fingerprint, **self.linears.identity()}

    def begin(self) -> None:
        """See Task."""
        self.linears.begin()

    def save(self, folder: Path) -> None:
        """See Task."""
        self.linears.save(folder, self.TAG)

    def restore(self, folder: Path) -> None:
        """See Task."""
        self.linears.restore(folder)

    def finish(self, folder: Path, step: int) -> None:
        """See Task."""
        with replacing_directory(folder) as temporary:
            self.save(temporary)
            self._describe(temporary, folder.parent, step)

    def _describe(self, folder: Path, out: Path, step: int) -> None:
        """Add curves, settings and what came of the run to the card."""
        config = self.config
        curves = [("loss", ("loss/total", "validation/loss"), "nats")]
        others = [n for n, _ in summary(out) if n != "validation/loss"]
        draw_curves(out, folder / "curves.png", [*curves, ("validation", others, "")])
        figures = "\n".join(f"- {n.split('/')[1]}: {value:.4f}" for n, value in summary(out))
        card = (folder / "README.md").read_text()
        card += f"""
{self.title}: {step} steps of {config.batch_size} texts with gen_fast; settings in
`training.yaml`. {"On held-out rows:" if figures else ""}

{figures}

![curves](curves.png)
"""
        (folder / "README.md").write_text(card)
        (folder / "training.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))

    def _flops(self, tokens: int, predicted: int = 0) -> float:
        """Of the linears' weights and the head, forward and back; the head gets no gradient."""
        linears = self.linears.flops * self.backbone.config.non_embedding_parameters * tokens
        return linears + 4.0 * self.backbone.embedding.numel() * predicted


@dataclass(frozen=True)
class Parts:
    """What a step begins with.

    backbone: with the steps before merged into it; source: the base's directory. wrapper: what
    encoding will put around instruction and text. rejections: to be filled with what is left out of
    the data.
    """

    backbone: Backbone
    source: Path
    tokenizer: Tokenizer
    wrapper: Wrapper
    rejections: Rejections

    @classmethod
    def load(cls, config: AdaptedConfig, *, bidirectional: bool = False) -> "Parts":
        """bidirectional: the backbone is run without its causal mask.

        Raises ModelNotFoundError, and as `read_checkpoint` and `load_backbone` do; ConfigError for
        an int8 backbone.
        """
        device = run_device(config)
        directory = resolve(config.backbone, config.backbone_revision)
        below = read_checkpoint(directory, config.backbone)
        backbone = load_backbone(
            below.source,
            dtype=resolve_dtype(config.dtype, device),
            device=device,
            adapters=below.adapters,
            bidirectional=bidirectional,
            quantize=config.quantize,
        )
        if backbone.quantize == INT8:
            raise ConfigError(
                "int8 moves factors into the weights, so that LoRA factors trained over it fit no "
                "other backbone: take int4, int8-weight-only or none"
            )
        return cls(
            backbone,
            below.source,
            load_tokenizer(below.tokenizer),
            below.wrapper,
            Rejections(Path(config.out) / "rejected.jsonl"),
        )


def read_all_texts(config: AdaptedConfig, rejections: Rejections) -> tuple[list[str], list[str]]:
    """Ids and texts of all files; empty texts are left out and counted."""
    ids: list[str] = []
    texts: list[str] = []
    for number, source in enumerate(config.texts):
        read = read_texts(source, text_column=config.text_column, id_column=config.id_column)
        for identifier, text in zip(read.ids, read.texts, strict=True):
            name = f"{number}:{identifier}" if len(config.texts) > 1 else identifier
            if text.strip():
                ids.append(name)
                texts.append(text.strip())
            else:
                rejections.add(name, "empty text")
    if not texts:
        raise InputError(f"{', '.join(config.texts)}: no usable text")
    return ids, texts


def split(ids: Sequence[str], held_out: int) -> tuple[list[int], list[int]]:
    """Places to train on, and places that are held out. Raises ConfigError if none is left."""
    held = smallest_hashes(ids, held_out)
    train = [i for i, identifier in enumerate(ids) if identifier not in held]
    if not train:
        raise ConfigError(f"{len(ids)} rows, of which {held_out} for validation: none is left")
    return train, [i for i, identifier in enumerate(ids) if identifier in held]


def fingerprint_of(rows: Sequence[np.ndarray]) -> str:
    """A hash of id arrays: a run is continued with the same data only."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.astype(np.int32).tobytes())
    return digest.hexdigest()
