"""Settings of LLM2Vec's training steps (arXiv 2404.05961)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gen_fast.errors import ConfigError
from gen_fast.formats.llm2vec import Settings
from gen_fast.training.adapted_config import AdaptedConfig
from gen_fast.training.choices import STEPS

# What each step takes where nothing is given: batch, tokens of a text, learning rate, warm-up,
# attention dropout, scale of the cosines. Source: the paper, appendix D, and the settings that
# come with its code.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mntp": {
        "batch_size": 32,
        "max_length": 512,
        "learning_rate": 5e-5,
        "warmup_steps": 0,
        "attention_dropout": 0.0,
        "contrastive_scale": 20.0,
    },
    "simcse": {
        "batch_size": 128,
        "max_length": 128,
        "learning_rate": 3e-5,
        "warmup_steps": 0,
        "attention_dropout": 0.3,
        "contrastive_scale": 20.0,
    },
    "supervised": {
        "batch_size": 512,
        "max_length": 512,
        "learning_rate": 2e-4,
        "warmup_steps": 300,
        "attention_dropout": 0.0,
        "contrastive_scale": 50.0,
    },
}


ENCODED_TOKENS = 512  # of a text that is embedded, at least

# Settings that mean something in some steps alone.
_ONLY = {
    "query_prompt": ("supervised",),
    "text_column": ("mntp", "simcse"),
    "id_column": ("mntp", "simcse"),
}


@dataclass(frozen=True)
class LLM2VecConfig(AdaptedConfig):
    """Settings of one step of LLM2Vec. What is None is taken from DEFAULTS.

    step: "mntp", "simcse" or "supervised". texts: files; for the first two of texts (txt, jsonl,
    csv, parquet, with text_column and perhaps id_column), for the last jsonl files of {"id",
    "query", "answer"} and perhaps {"negative_answer"}: in all rows, or in none.
    query_prompt: put before queries of the supervised step, attended to and not pooled.
    max_length: tokens of a text, or of a block of running text.
    mask: of attention, "bidirectional", or "causal" for comparisons. mask_probability, masking
    ("bert" or "always"), mask_token: see mntp.hide.
    attention_dropout: of attention's weights. contrastive_scale: of the cosines in InfoNCE.
    """

    step: str = ""
    query_prompt: str = ""
    mask: str = "bidirectional"
    mask_probability: float = 0.2
    masking: str = "bert"
    mask_token: str = "_"
    attention_dropout: float | None = None
    contrastive_scale: float | None = None
    batch_size: int = None  # type: ignore[assignment]
    warmup_steps: int = None  # type: ignore[assignment]

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **AdaptedConfig.CHOICES,
        "step": STEPS,
        "mask": ("bidirectional", "causal"),
        "masking": ("bert", "always"),
    }
    REQUIRED = ("step", *AdaptedConfig.REQUIRED)
    POSITIVE = ("contrastive_scale", "mask_probability", *AdaptedConfig.POSITIVE)

    def __post_init__(self) -> None:
        for name, value in DEFAULTS.get(self.step, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        for name, steps in _ONLY.items():
            if getattr(self, name) and self.step not in steps:
                raise ConfigError(f"{name} means nothing in the step {self.step}")
        assert self.attention_dropout is not None
        if not 0 <= self.attention_dropout < 1:
            raise ConfigError(f"attention_dropout must be in [0, 1), not {self.attention_dropout}")
        if self.mask_probability > 1:
            raise ConfigError(f"mask_probability must be at most 1, not {self.mask_probability}")
        if self.step == "simcse" and not self.attention_dropout and not self.lora_dropout:
            raise ConfigError("simcse without dropout shows the same text twice: nothing is learnt")

    @property
    def encoding(self) -> Settings:
        """How texts are embedded with what is trained: the mean over their own tokens.

        Longer texts than were trained on, as the paper evaluates them.
        """
        assert self.max_length is not None
        return Settings("mean", max(ENCODED_TOKENS, self.max_length), doc_max_length=None)
