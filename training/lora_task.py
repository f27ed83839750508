"""What tasks have in common that train LoRA factors over a frozen backbone: data and files."""

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
from gen_fast.formats.peft import read_adapter, write_adapter
from gen_fast.io.text_files import read_texts
from gen_fast.model.backbone import Backbone
from gen_fast.model.device import resolve_dtype
from gen_fast.model.lora import Lora, LoraWeights
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import Tokenizer, load_tokenizer
from gen_fast.model.weights import load_backbone
from gen_fast.training.adapted_config import AdaptedConfig
from gen_fast.training.data import smallest_hashes
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


class LoraTask(Task[Any]):
    """The factors, and the files they are written to.

    TAG: of the adapter's model card. lora: the factors, all of `parameters` or a part of them.
    """

    TAG: ClassVar[str]
    config: AdaptedConfig
    lora: Lora

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
        self.lora = Lora(config.lora, backbone.config, seed=config.seed).to(backbone.device)
        self.parameters = self.lora
        self._data = data
        self._start = _start_of(config, backbone)

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
        start = None if self._start is None else self._start.sha256()
        return {"data": self._data.fingerprint, "lora_start_sha256": start}

    def begin(self) -> None:
        """See Task."""
        if self._start is not None:
            self.lora.copy_factors(self._start.factors)

    def save(self, folder: Path) -> None:
        """See Task."""
        config = self.config
        # A path is one from anywhere, and no name of the Hub.
        is_local = Path(config.backbone).exists()
        write_adapter(
            folder,
            self.lora.weights(),
            base=str(Path(config.backbone).resolve()) if is_local else config.backbone,
            revision=config.backbone_revision,
            fingerprint=self.backbone.fingerprint,
            tags=(self.TAG,),
        )

    def restore(self, folder: Path) -> None:
        """See Task."""
        self.lora.copy_factors(read_adapter(folder).weights.factors)

    def finish(self, folder: Path, step: int) -> None:
        """See Task."""
        config, out = self.config, folder.parent
        self.save(folder)
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
        """2 for each weight and token forward and as many back; the head twice."""
        head = self.backbone.embedding.numel()
        return 4.0 * (self.backbone.config.non_embedding_parameters * tokens + head * predicted)


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

        Raises ModelNotFoundError, and as `read_checkpoint` and `load_backbone` do."""
        device = run_device(config)
        directory = resolve(config.backbone, config.backbone_revision)
        below = read_checkpoint(directory, config.backbone)
        backbone = load_backbone(
            below.source,
            dtype=resolve_dtype(config.dtype, device),
            device=device,
            adapters=below.adapters,
            bidirectional=bidirectional,
        )
        return cls(
            backbone,
            below.source,
            load_tokenizer(below.tokenizer),
            below.wrapper,
            Rejections(Path(config.out) / "rejected.jsonl"),
        )


def _start_of(config: AdaptedConfig, backbone: Backbone) -> LoraWeights | None:
    """The adapter that the factors begin as. Raises BackboneMismatchError or ConfigError."""
    if not config.lora_start:
        return None
    adapter = read_adapter(resolve(config.lora_start))
    adapter.check_fingerprint(backbone.fingerprint)
    adapter.weights.check_backbone(backbone.config)
    theirs, own = adapter.weights.config, config.lora
    for name in ("rank", "scale", "modules"):
        if getattr(theirs, name) != getattr(own, name):
            raise ConfigError(
                f"lora_start {config.lora_start} has {name} {getattr(theirs, name)}, this run "
                f"{getattr(own, name)}: give lora_rank and lora_alpha as it was trained"
            )
    return adapter.weights


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
