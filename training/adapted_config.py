"""What runs have in common that train LoRA factors over texts."""

from dataclasses import dataclass
from typing import ClassVar

from gen_fast.errors import ConfigError
from gen_fast.model.lora import LoraConfig
from gen_fast.training.config import RunConfig


@dataclass(frozen=True)
class AdaptedConfig(RunConfig):
    """Texts, and the sizes of the adapter that is trained on them.

    texts: files (txt, jsonl, csv, parquet), with text_column and perhaps id_column.
    max_length: tokens of a text.
    lora_rank, lora_alpha, lora_dropout: see LoraConfig. lora_start: an adapter whose factors are
    gone on with, over the same backbone; by default they begin anew.
    recompute: run layers again in the backward pass, which takes less memory and more time.
    """

    texts: tuple[str, ...] = ()
    text_column: str | None = None
    id_column: str | None = None
    max_length: int | None = None
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_start: str = ""
    recompute: bool = False
    warmup_steps: int = 0
    steps: int = 1000

    REQUIRED: ClassVar[tuple[str, ...]] = ("texts", "out")
    POSITIVE: ClassVar[tuple[str, ...]] = ("max_length", *RunConfig.POSITIVE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype == "float16":
            raise ConfigError("float16 loses small gradients: take bfloat16 or float32")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")

    @property
    def lora(self) -> LoraConfig:
        """Sizes of the adapter."""
        return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout)
