"""How a job's rows become embeddings: all that its user may choose of it."""

import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gen_fast.embed.choices import DEFAULT_MODEL
from gen_fast.embed.encoder import Encoder
from gen_fast.embed.loading import identify, load
from gen_fast.errors import ConfigError, JobError, PromptError
from gen_fast.io.choices import PRECISIONS, Precision
from gen_fast.jobs.choices import (
    DEFAULT_MAX_TEXT_BYTES,
    DEFAULT_ROWS_PER_PART,
    DEFAULT_SPLIT,
)
from gen_fast.model.device import resolve_dtype
from gen_fast.model.fingerprint import described, differences
from gen_fast.model.quantized import check_quantize
from gen_fast.model.sources import lasting_name

# Fields whose names in plan.json are other ones.
_NAMES_IN_PLAN = {"normalize_embeddings": "normalize"}
# The key of an identity that holds a fingerprint.
_BACKBONE = "backbone"
# One of a pair takes the place of the other.
_EXCLUSIVE = (("prompt", "prompt_name"), ("text_column", "template"))


@dataclass(frozen=True)
class Settings:
    """How rows become embeddings: all that its user may choose of a job's output.

    model to deterministic: as for `gen_fast.load`. prompt to truncate_dim: as for Encoder.encode.
    precision: float32, float16, int8 (with a column "scale") or ubinary (signs as bits).
    text_column: None takes "text", else the only column of strings. id_column: None numbers the
    rows of the job. template: such as "{title}\\n{text}", instead of a text column.
    file_format: of all inputs; None goes by the suffixes. split: of a "datasets:NAME".
    max_text_bytes: longer texts are rejected. rows_per_part: rows of an input in one file.
    """

    model: str | Path = DEFAULT_MODEL
    method: str | None = None
    backbone: str | Path | None = None
    revision: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    max_length: int | None = None
    deterministic: bool = False
    prompt: str | None = None
    prompt_name: str | None = None
    normalize_embeddings: bool = False
    truncate_dim: int | None = None
    precision: Precision = "float32"
    text_column: str | None = None
    id_column: str | None = None
    template: str | None = None
    file_format: str | None = None
    split: str = DEFAULT_SPLIT
    max_text_bytes: int = DEFAULT_MAX_TEXT_BYTES
    rows_per_part: int = DEFAULT_ROWS_PER_PART

    def replaced(self, **changes: Any) -> "Settings":
        """These settings with other values of some fields.

        A prompt takes the place of a prompt's name, and a template that of a text column; so do
        they the other way round. Raises TypeError for what is no field.
        """
        excluded = {
            other: None
            for pair in _EXCLUSIVE
            for name, other in (pair, reversed(pair))
            if changes.get(name) is not None
        }
        return replace(self, **{**excluded, **changes})

    def resolved(self, device: str) -> "PlanSettings":
        """As a plan has them: the model's identity, a dtype of `device`, the prompt's text.

        Raises ConfigError or PromptError for settings that mean nothing; those that can be told
        without the model before it is downloaded. Raises what `load` raises.
        """
        if self.prompt is not None and self.prompt_name is not None:
            raise PromptError("give prompt or prompt_name, not both")
        dtype = str(resolve_dtype(self.dtype, torch.device(device))).removeprefix("torch.")
        check_quantize(self.quantize)
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.template is not None:
            if self.text_column is not None:
                raise ConfigError("give a text column or a template, not both")
            parse_template(self.template)
        if self.method == "hyde":
            raise ConfigError(
                "HyDE answers queries and embeds documents as they are: for a corpus take 'mean'"
            )
        identity = self._identify()
        # A layout may keep fewer dimensions than there are, unless it is asked for more.
        full = int(identity.get("full_dimension", identity["dimension"]))
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= full:
            raise ConfigError(f"truncate_dim {self.truncate_dim} is outside 1…{full}")
        values = {
            **vars(self),
            "model": lasting_name(self.model),
            "backbone": None if self.backbone is None else lasting_name(self.backbone),
            "dtype": dtype,
            "prompt": self._prompt_text(identity),
            "prompt_name": None,
        }
        return PlanSettings(**values, identity=identity)

    def _identify(self) -> dict[str, Any]:
        return identify(
            self.model, method=self.method, backbone=self.backbone, revision=self.revision
        )

    def _prompt_text(self, identity: Mapping[str, Any]) -> str:
        if self.prompt is not None:
            return self.prompt
        name = self.prompt_name
        if name is None:
            name = identity.get("default_prompt_name")
        if name is None:
            return ""
        prompts = identity["prompts"]
        if name not in prompts:
            raise PromptError(f"no prompt named {name!r}; there are {', '.join(prompts)}")
        return str(prompts[name])


@dataclass(frozen=True)
class PlanSettings(Settings):
    """Settings of a planned job, made by `Settings.resolved`. It only goes on with the same ones.

    identity: what gen_fast.embed.loading.identify says of the model.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)

    def load_encoder(self, device: str | torch.device | None) -> Encoder:
        """The encoder that the plan asks for. Raises JobError if this machine has another model."""
        present = self._identify()
        recorded = self.identity
        wrong = [key for key in recorded if key != _BACKBONE and present.get(key) != recorded[key]]
        pair = recorded[_BACKBONE], present[_BACKBONE]
        keys = differences(*pair, same_copy=True)
        if keys or wrong:
            what = [*wrong, *([described(keys, *pair)] if keys else [])]
            raise JobError(
                f"{self.model} is not the model that the plan was made with: it differs in "
                f"{', '.join(what)}"
            )
        return load(
            self.model,
            method=self.method,
            backbone=self.backbone,
            revision=self.revision,
            device=device,
            dtype=self.dtype,
            quantize=self.quantize,
            max_length=self.max_length,
            deterministic=self.deterministic,
        )

    @property
    def dimension(self) -> int:
        """Of the embeddings that are stored."""
        return self.truncate_dim or int(self.identity["dimension"])

    def as_json(self) -> dict[str, Any]:
        """As plan.json has them."""
        values = asdict(self)
        del values["prompt_name"]  # its text is `prompt`
        if self.quantize is None:  # as in plans of before
            del values["quantize"]
        return {_NAMES_IN_PLAN.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PlanSettings":
        """Read what `as_json` gave."""
        names = {written: name for name, written in _NAMES_IN_PLAN.items()}
        return cls(**{names.get(name, name): value for name, value in values.items()})


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split "{title}\\n{text}" into (literal, column behind it or None). Raises ConfigError."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}") from error
    for _, name, form, conversion in pieces:
        # Only names: attributes, indices and formats have no meaning for a column.
        if name is not None and (not name or form or conversion or set(name) & set(".[]")):
            raise ConfigError(f"template {template!r}: {{{name}}} is not the name of a column")
    if all(name is None for _, name, _, _ in pieces):
        raise ConfigError(f"template {template!r} names no column")
    return [(literal, name) for literal, name, _, _ in pieces]
