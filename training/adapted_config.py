"""What runs have in common that train a backbone's linears over texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gen_fast.errors import ConfigError
from gen_fast.model.lora import LoraConfig
from gen_fast.training.config import RunConfig


@dataclass(frozen=True)
class AdaptedConfig(RunConfig):
    """Texts, and what is trained on them: LoRA factors, unless a method's settings say otherwise.

    texts: files (txt, jsonl, csv, parquet), with text_column and perhaps id_column.
    max_length: tokens of a text.
    lora_rank, lora_alpha, lora_dropout: see LoraConfig; None is that of LORA, where factors are
    trained. lora_start: an adapter whose factors are gone on with, over the same backbone; by
    default they begin anew.
    recompute: run layers again in the backward pass, which takes less memory and more time.
    """

    texts: tuple[str, ...] = ()
    text_column: str | None = None
    id_column: str | None = None
    max_length: int | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    lora_start: str = ""
    recompute: bool = False
    warmup_steps: int = 0
    steps: int = 1000

    # What the factors have where nothing is given.
    LORA: ClassVar[Mapping[str, float]] = {
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.05,
    }
    REQUIRED: ClassVar[tuple[str, ...]] = ("texts", "out")
    POSITIVE: ClassVar[tuple[str, ...]] = ("max_length", *RunConfig.POSITIVE)

    def __post_init__(self) -> None:
        for name, value in self.LORA.items():
            if self.trains_lora and getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        for name in () if self.trains_lora else (*self.LORA, "lora_start", "quantize"):
            if getattr(self, name) not in (None, ""):
                raise ConfigError(
                    f"{name} means nothing with full, which trains the weights and no LoRA factors"
                )
        if self.dtype == "float16":
            raise ConfigError("float16 loses small gradients: take bfloat16 or float32")
        if not 0 <= (self.lora_dropout or 0.0) < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")

    @property
    def trains_lora(self) -> bool:
        """Whether LoRA factors are trained, and not the weights of the linears."""
        return True

    @property
    def lora(self) -> LoraConfig:
        """Sizes of the adapter, where LoRA factors are trained."""
        assert self.lora_rank is not None
        assert self.lora_alpha is not None
        assert self.lora_dropout is not None
        return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout)
