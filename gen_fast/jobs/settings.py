"""How a job's rows become embeddings: all that its user may choose of it."""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gen_fast.errors import ConfigError, PromptError
from gen_fast.io.precision import PRECISIONS, Precision

DEFAULT_ROWS_PER_PART = 8192
DEFAULT_MAX_TEXT_BYTES = 1_000_000


@dataclass(frozen=True)
class Settings:
    """How rows become embeddings. A job can only go on with the same settings.

    text_column: None takes "text", else the only column of strings. template: such as
    "{title}\\n{text}", instead of a text column. id_column: None numbers the rows of the job.
    prompt: the instruction itself. truncate_dim: None keeps all dimensions.
    max_text_bytes: longer texts are rejected. identity: what gen_fast.embed.loading.identify says.
    """

    model: str
    method: str | None = None
    backbone: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    max_length: int | None = None
    deterministic: bool = False
    prompt: str = ""
    normalize: bool = False
    truncate_dim: int | None = None
    precision: Precision = "float32"
    text_column: str | None = None
    id_column: str | None = None
    template: str | None = None
    file_format: str | None = None
    split: str = "train"
    max_text_bytes: int = DEFAULT_MAX_TEXT_BYTES
    rows_per_part: int = DEFAULT_ROWS_PER_PART
    identity: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ConfigError for settings that mean nothing, whatever the model."""
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.template is not None:
            if self.text_column is not None:
                raise ConfigError("give a text column or a template, not both")
            parse_template(self.template)

    def of(self, identity: Mapping[str, Any], prompt_name: str | None) -> "Settings":
        """These settings for a model, with one of its prompts. Raises ConfigError, PromptError."""
        if identity["method"] == "hyde":
            raise ConfigError(
                "HyDE answers queries and embeds documents as they are: for a corpus take 'mean'"
            )
        # A layout may keep fewer dimensions than there are, unless it is asked for more.
        full = int(identity.get("full_dimension", identity["dimension"]))
        prompts = identity["prompts"]
        if self.truncate_dim is not None and not 1 <= self.truncate_dim <= full:
            raise ConfigError(f"truncate_dim {self.truncate_dim} is outside 1…{full}")
        if prompt_name is not None and prompt_name not in prompts:
            raise PromptError(f"no prompt named {prompt_name!r}; there are {', '.join(prompts)}")
        prompt = self.prompt if prompt_name is None else prompts[prompt_name]
        return replace(self, identity=identity, prompt=prompt)

    @property
    def dimension(self) -> int:
        """Of the embeddings that are stored."""
        return self.truncate_dim or int(self.identity["dimension"])


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
