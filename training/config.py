"""One training run's settings: a YAML file, overridden by flags."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import yaml

from gen_fast.embed.adapter import DEFAULT_PROMPTS
from gen_fast.embed.choices import DEFAULT_MODEL
from gen_fast.errors import ConfigError
from gen_fast.model.quantized import check_quantize
from gen_fast.ops.distill import ALIGNMENTS
from gen_fast.training.choices import SCHEDULES, SPECIAL_INITS

# Of the special tokens, by family. Source: LLM2Vec-Gen, arXiv 2603.10913, §4.
LEARNING_RATES = {"qwen3": 3e-4}
OTHER_LEARNING_RATE = 5e-4

# A flag may come several times.
_LISTS = ("answers", "texts", "report_to")
# Where a run lies and how it reports does not change what it computes. A backbone is told by its
# fingerprint, not by where it lies.
_NOT_PART_OF_THE_RUN = (
    "lora_start",
    "recompute",
    "answers",
    "texts",
    "teacher",
    "out",
    "backbone",
    "prompts",
    "steps",
    "max_skipped",
    "device",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "report_to",
)


@dataclass(frozen=True)
class OptimizerConfig:
    """Steps, and what each does to the parameters.

    batch_size: texts a step, all ranks together. micro_batch_tokens: run with gradient at a time;
    None fits the device. learning_rate: None is the method's own. It rises over warmup_steps and
    falls to 0 at schedule_steps, along a line or half a cosine (schedule); the run stops at
    `steps`. max_skipped: steps in a row with a NaN loss that are survived.
    """

    batch_size: int = 32
    micro_batch_tokens: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup_steps: int = 100
    schedule: str = "linear"
    schedule_steps: int = 20_000
    steps: int = 5_000
    max_grad_norm: float = 1.0
    max_skipped: int = 10


@dataclass(frozen=True)
class RunConfig(OptimizerConfig):
    """What every run has: a backbone, where it is computed, what is written of it.

    out: a directory. backbone: anything that names a model. quantize: what its linears are kept in,
    as for `gen_fast.load`. validation_rows: held out, chosen by a hash of their ids. report_to:
    "tensorboard", "wandb"; curves and metrics.jsonl are always written.
    """

    out: str = ""
    backbone: str = DEFAULT_MODEL
    backbone_revision: str | None = None
    quantize: str | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    validation_rows: int = 256
    validate_every: int = 500
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    report_to: tuple[str, ...] = ("tensorboard",)

    # What a setting may be, must be given, or must be above 0 unless it is None.
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {"schedule": SCHEDULES}
    REQUIRED: ClassVar[tuple[str, ...]] = ("out",)
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "batch_size",
        "learning_rate",
        "schedule_steps",
        "steps",
        "max_grad_norm",
        "validate_every",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
    )

    def __post_init__(self) -> None:
        for name in self.REQUIRED:
            if not getattr(self, name):
                raise ConfigError(f"{name} must be given")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} must be a finite number, not {value}")
        check_quantize(self.quantize)
        for name in self.POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, not {value}")
        for name in ("weight_decay", "warmup_steps", "max_skipped", "validation_rows", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"seed must be below 2^63, not {self.seed}")
        for name, allowed in self.CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} must be {' or '.join(allowed)}, not {getattr(self, name)!r}"
                )

    def identity(self) -> dict[str, Any]:
        """What must agree when a run is continued from a checkpoint."""
        values = json.loads(json.dumps(asdict(self)))
        if self.quantize is None:  # as in checkpoints of before
            del values["quantize"]
        return {k: v for k, v in values.items() if k not in _NOT_PART_OF_THE_RUN}

    def plain(self) -> dict[str, Any]:
        """The settings as YAML takes them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class TextConfig:
    """What is trained on, and how it is read.

    answers: jsonl files of {"id", "query", "answer"} and perhaps {"negative_query",
    "negative_answer"}. teacher: parquet of their vectors, as `gen-fast teach` writes it.
    n_thought, n_compression: special tokens. prompt: put before every query. max_length: tokens of
    a query with its special tokens. max_answer_tokens: with its beginning and its end. answer_end:
    what is put after an answer that ended by itself; None is the tokenizer's end of text. prompts:
    of the adapter.
    """

    answers: tuple[str, ...] = ()
    teacher: str = ""
    n_thought: int = 0
    n_compression: int = 10
    prompt: str = ""
    max_length: int = 512
    max_answer_tokens: int = 512
    answer_end: str | None = None
    prompts: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_PROMPTS))

    @property
    def n_special(self) -> int:
        """Thought and compression tokens together."""
        return self.n_thought + self.n_compression


@dataclass(frozen=True)
class LossConfig:
    """The losses, each with its weight; 0 leaves it out.

    alignment: "mse" or "cosine". alignment_scale: of every "mse" between an embedding and a
    teacher's vector (alignment, repeat, negative). "variance" divides it by the variance of the
    teacher's vectors, so that predicting their mean costs 1 whatever their length and dimension d;
    "dimension" sums over d, as the paper's formula; "mean" takes the mean over d, as the reference
    package. Losses are reported with their scale. "cosine" has none.
    repeat_weight: a second pass over repeat_prompt + answer, aligned to the same teacher vector.
    negative_weight: alignment of negative queries to their answers. margin_weight, margin: hinge on
    squared distances to other texts. contrastive_weight, contrastive_scale: InfoNCE of queries
    against repeated answers and negatives.
    """

    reconstruction_weight: float = 1.0
    alignment_weight: float = 1.0
    alignment: str = "mse"
    alignment_scale: str = "variance"
    repeat_weight: float = 0.0
    repeat_prompt: str = "Repeat this text word by word. "
    negative_weight: float = 0.0
    margin_weight: float = 0.0
    margin: float = 0.0
    contrastive_weight: float = 0.0
    contrastive_scale: float = 20.0

    def weights(self) -> dict[str, float]:
        """Of each loss, by its name."""
        return {
            "reconstruction": self.reconstruction_weight,
            "alignment": self.alignment_weight,
            "repeat": self.repeat_weight,
            "negative": self.negative_weight,
            "margin": self.margin_weight,
            "contrastive": self.contrastive_weight,
        }

    def alignment_factor(self, dimension: int, teacher_variance: float) -> float:
        """What the mean over d of squared errors is multiplied by, of teacher vectors [n, d]."""
        if self.alignment == "cosine" or self.alignment_scale == "mean":
            return 1.0
        return dimension if self.alignment_scale == "dimension" else 1 / teacher_variance

    @property
    def needs_negatives(self) -> bool:
        """Whether a loss over negative queries and answers is on."""
        return bool(self.negative_weight or self.margin_weight or self.contrastive_weight)

    @property
    def needs_repeats(self) -> bool:
        """Whether answers are embedded behind the repeat prompt."""
        return bool(self.repeat_weight or self.contrastive_weight)


@dataclass(frozen=True)
class StartConfig:
    """Where the parameters begin, and what is special to some of them.

    special_init: special tokens begin as a "draw" from the distribution of the embedding table's
    rows, or all at its "mean" row. start: of the alignment, "fitted" (see fitting.py) over
    start_rows, or "random" as in the paper. refit_rows: rows that the alignment is fitted to once
    more when the run is done; 0 leaves it as trained. reconstruction_learning_rate,
    alignment_learning_rate: of the projections, None that of the special tokens.
    """

    special_init: str = "draw"
    start: str = "fitted"
    start_rows: int = 2048
    refit_rows: int = 0
    reconstruction_learning_rate: float | None = None
    alignment_learning_rate: float | None = None


@dataclass(frozen=True)
class TrainConfig(StartConfig, LossConfig, TextConfig, RunConfig):
    """Settings of a run of LLM2Vec-Gen.

    The defaults are those of the paper (arXiv 2603.10913, §4), but for three: `alignment_scale`
    divides by the teacher's variance (paper: the sum over dimensions; reference package: the mean),
    `start` is fitted (random), and only answers that stopped by themselves get an end of text, the
    tokenizer's own (all, a literal one). learning_rate: of the special tokens; None is the paper's
    for the backbone's family.
    """

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **RunConfig.CHOICES,
        "alignment": ALIGNMENTS,
        "alignment_scale": ("variance", "dimension", "mean"),
        "special_init": SPECIAL_INITS,
        "start": ("fitted", "random"),
    }
    REQUIRED = ("answers", "teacher", "out")
    POSITIVE = (
        "n_compression",
        "max_length",
        "max_answer_tokens",
        "start_rows",
        *RunConfig.POSITIVE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, weight in self.weights().items():
            if weight < 0:
                raise ConfigError(f"{name}_weight must not be negative")
        if not self.reconstruction_weight and not self.alignment_weight:
            raise ConfigError("reconstruction_weight and alignment_weight are both 0")
        if self.n_special >= self.max_length:
            raise ConfigError(f"{self.n_special} special tokens leave no room in {self.max_length}")
        if self.n_thought < 0:
            raise ConfigError(f"n_thought must not be negative, not {self.n_thought}")

    def base_learning_rate(self, family: str) -> float:
        """learning_rate, or the paper's for backbones of `family` (a Hugging Face model_type)."""
        return self.learning_rate or LEARNING_RATES.get(family, OTHER_LEARNING_RATE)


Config = TypeVar("Config", bound=RunConfig)


def read_settings(path: str | Path | None) -> dict[str, Any]:
    """The settings of a YAML file; none if it is None. Raises ConfigError."""
    if path is None:
        return {}
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no settings")
    return loaded


def read_config(values: Mapping[str, Any], kind: type[Config]) -> Config:
    """A configuration from settings, as YAML or flags give them. Raises ConfigError."""
    types = {field.name: get_type_hints(kind)[field.name] for field in fields(kind)}
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; there are {', '.join(types)}")
    return kind(**{name: _typed(name, value, types[name]) for name, value in values.items()})


def parse_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Turn ["--batch-size", "8", "--prompt=x"] into settings. Raises ConfigError."""
    settings: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag, has_value, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ConfigError(f"expected a flag such as --batch-size, got {flag!r}")
        if not has_value:
            if not rest:
                raise ConfigError(f"{flag} needs a value")
            value = rest.pop(0)
        name = flag.removeprefix("--").replace("-", "_")
        if name in _LISTS:  # --answers a.jsonl --answers b.jsonl
            settings[name] = [*settings.get(name, []), value]
        else:
            settings[name] = value
    return settings


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value`, from YAML or a flag, as the field's type. Raises ConfigError."""
    options = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None or value == "null":
        if type(None) in options:
            return None
        raise ConfigError(f"{name} must be given")
    kind = options[0]
    if get_origin(kind) is tuple:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(x, str) for x in values):
            raise ConfigError(f"{name} must be a list of strings, not {value!r}")
        return tuple(x for x in values if x)
    if kind is bool:
        known = {"true": True, "false": False}
        if str(value).lower() not in known:
            raise ConfigError(f"{name} must be true or false, not {value!r}")
        return known[str(value).lower()]
    if get_origin(kind) is not None:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a mapping, not {value!r}")
        return {str(k): str(v) for k, v in value.items()}
    try:
        if isinstance(value, bool):
            raise ValueError
        converted = kind(value)
        if kind is int and float(value) != converted:
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{name} must be {kind.__name__}, not {value!r}") from error
    return converted
