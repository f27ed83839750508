"""What is trained of a backbone's linears, and its files: LoRA factors, or the weights."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from gen_fast.errors import AdapterError, ConfigError, WeightsError
from gen_fast.formats.causal_lm import write_causal_lm
from gen_fast.formats.llm2vec import read_checkpoint
from gen_fast.formats.peft import read_adapter, write_adapter
from gen_fast.model.backbone import Backbone
from gen_fast.model.full import FullWeights
from gen_fast.model.lora import Lora, LoraWeights
from gen_fast.model.sources import resolve
from gen_fast.model.tensor_files import find_tensors
from gen_fast.training.adapted_config import AdaptedConfig


class TrainedLinears(ABC):
    """An update of a backbone's linears: where it begins, and how it is written.

    update: the module whose parameters are trained, as a pass takes it. flops: of a weight and
    token of the linears in a step, forward and back.
    """

    update: Lora | FullWeights
    flops: ClassVar[float]

    def __init__(self, config: AdaptedConfig, backbone: Backbone) -> None:
        self._config, self._backbone = config, backbone

    def identity(self) -> dict[str, Any]:
        """See Task."""
        return {}

    @abstractmethod
    def begin(self) -> None:
        """See Task."""

    @abstractmethod
    def save(self, folder: Path, tag: str) -> None:
        """See Task. tag: of the model card."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """See Task."""

    @property
    def _base(self) -> str:
        """The backbone's name. A path is one from anywhere, and no name of the Hub."""
        name = self._config.backbone
        return str(Path(name).resolve()) if Path(name).exists() else name


class LoraFactors(TrainedLinears):
    """LoRA factors, written as PEFT's adapters."""

    update: Lora
    flops = 4.0  # the product, and the gradient of its input

    def __init__(self, config: AdaptedConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.update = Lora(config.lora, backbone.config, seed=config.seed).to(backbone.device)
        self._start = _start_of(config, backbone)

    def identity(self) -> dict[str, Any]:
        """See Task."""
        return {"lora_start_sha256": None if self._start is None else self._start.sha256()}

    def begin(self) -> None:
        """See Task."""
        if self._start is not None:
            self.update.copy_factors(self._start.factors)

    def save(self, folder: Path, tag: str) -> None:
        """See TrainedLinears."""
        write_adapter(
            folder,
            self.update.weights(),
            base=self._base,
            revision=self._config.backbone_revision,
            fingerprint=self._backbone.fingerprint,
            tags=(tag,),
        )

    def restore(self, folder: Path) -> None:
        """See Task."""
        self.update.copy_factors(read_adapter(folder).weights.factors)


class AllWeights(TrainedLinears):
    """The weights, written as a whole model of transformers'.

    They begin as the base has them stored, with what lies between merged in float32.
    """

    update: FullWeights
    flops = 6.0  # also the gradient of the weight

    def __init__(self, config: AdaptedConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        directory = resolve(config.backbone, config.backbone_revision)
        self._below = below = read_checkpoint(directory, config.backbone)
        self.update = FullWeights(backbone.config, device=backbone.device)
        files = replace(find_tensors(below.source), adapters=below.adapters)
        self.update.copy(lambda name, shape: files.get(f"{name}.weight", shape))

    def begin(self) -> None:
        """See Task. They have their values."""

    def save(self, folder: Path, tag: str) -> None:
        """See TrainedLinears."""
        write_causal_lm(
            folder,
            self._below.source,
            self._below.tokenizer,
            self.update.weights(),
            base=self._base,
            tags=(tag,),
        )

    def restore(self, folder: Path) -> None:
        """See Task."""
        try:
            files = find_tensors(folder)
            self.update.copy(lambda name, shape: files.get(f"{name}.weight", shape))
        except WeightsError as error:
            raise AdapterError(str(error)) from error


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
