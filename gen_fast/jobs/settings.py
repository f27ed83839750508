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
from gen_fast.model.sources import lasting_name

# Fields whose names in plan.json are other ones.
_NAMES_IN_PLAN = {"normalize_embeddings": "normalize"}


@dataclass(frozen=True)
class Settings:
    """How rows become embeddings. A job can only go on with the same settings.

    model to deterministic: as for `gen_fast.load`. prompt to truncate_dim: as for Encoder.encode.
    precision: float32, float16, int8 (with a column "scale") or ubinary (signs as bits).
    text_column: None takes "text", else the only column of strings. id_column: None numbers the
    rows of the job. template: such as "{title}\\n{text}", instead of a text column.
    file_format: of all inputs; None goes by the suffixes. split: of a "datasets:NAME".
    max_text_bytes: longer texts are rejected.
    identity: what gen_fast.embed.loading.identify says of the model; filled in by `resolved`.
    """

    model: str | Path = DEFAULT_MODEL
    method: str | None = None
    backbone: str | Path | None = None
    revision: str | None = None
    dtype: str = "auto"
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
    identity: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self, device: str) -> "Settings":
        """As a plan has them: the model's identity, a dtype of `device`, the prompt's text.

        Raises ConfigError or PromptError for settings that mean nothing, the first before a model
        is downloaded, and what `load` raises.
        """
        if self.prompt is not None and self.prompt_name is not None:
            raise PromptError("give prompt or prompt_name, not both")
        dtype = str(resolve_dtype(self.dtype, torch.device(device))).removeprefix("torch.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.template is not None:
            if self.text_column is not None:
                raise ConfigError("give a text column or a template, not both")
            parse_template(self.template)
        identity = self._identify()
        self._check(identity)
        return replace(
            self,
            model=lasting_name(self.model),
            backbone=None if self.backbone is None else lasting_name(self.backbone),
            dtype=dtype,
            prompt=self._prompt_text(identity),
            prompt_name=None,
            identity=identity,
        )

    def load_encoder(self, device: str | torch.device | None) -> Encoder:
        """The encoder that a plan asks for. Raises JobError if this machine has another model."""
        present = self._identify()
        if present != self.identity:
            wrong = [key for key in self.identity if present.get(key) != self.identity[key]]
            raise JobError(
                f"{self.model} is not the model that the plan was made with: it differs in "
                f"{', '.join(wrong)}"
            )
        return load(
            self.model,
            method=self.method,
            backbone=self.backbone,
            revision=self.revision,
            device=device,
            dtype=self.dtype,
            max_length=self.max_length,
            deterministic=self.deterministic,
        )

    @property
    def dimension(self) -> int:
        """Of the embeddings that are stored."""
        return self.truncate_dim or int(self.identity["dimension"])

    def as_json(self) -> dict[str, Any]:
        """Resolved settings as plan.json has them."""
        values = asdict(self)
        del values["prompt_name"]  # its text is `prompt`
        return {_NAMES_IN_PLAN.get(name, name): value for name, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """Read what `as_json` gave."""
        names = {written: name for name, written in _NAMES_IN_PLAN.items()}
        return cls(**{names.get(name, name): value for name, value in values.items()})

    def _identify(self) -> dict[str, Any]:
        return identify(
            self.model, method=self.method, backbone=self.backbone, revision=self.revision
        )

    def _check(self, identity: Mapping[str, Any]) -> None:
        """Raise ConfigError for what the model cannot do."""
        if identity["method"] == "hyde":
            raise ConfigError(
                "HyDE answers queries and embeds documents as they are: for a corpus take 'mean'"
            )
        # A layout may keep fewer dimensions than there are, unless it is asked for more.
        full = int(identity.get("full_dimension", identity["dimension"]))
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= full:
            raise ConfigError(f"truncate_dim {self.truncate_dim} is outside 1…{full}")

    def _prompt_text(self, identity: Mapping[str, Any]) -> str:
        if self.prompt is not None:
            return self.prompt
        name = self.prompt_name
        if name is None:
            name = identity.get("default_prompt_name")
        prompts = identity["prompts"]
        if name is None:
            return ""
        if name not in prompts:
            raise PromptError(f"no prompt named {name!r}; there are {', '.join(prompts)}")
        return str(prompts[name])


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
