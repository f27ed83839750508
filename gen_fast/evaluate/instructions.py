"""What is put before the texts of a task."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gen_fast.errors import ConfigError

logger = logging.getLogger(__name__)

PUBLISHED = Path(__file__).with_name("instructions.yaml")
_PARTS = {"documents", "types", "tasks"}


@dataclass(frozen=True)
class Instructions:
    """The lines of a file such as instructions.yaml: by task, by type of task, for documents."""

    tasks: Mapping[str, str]
    types: Mapping[str, str]
    documents: str

    @classmethod
    def read(cls, path: str | Path = PUBLISHED) -> "Instructions":
        """Read a YAML file of `documents`, `types` and `tasks`. Raises ConfigError."""
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
        if not isinstance(data, dict) or not set(data) <= _PARTS:
            raise ConfigError(f"{path} may have {', '.join(sorted(_PARTS))}, and nothing else")
        return cls(
            _lines(data.get("tasks"), path),
            _lines(data.get("types"), path),
            str(data.get("documents") or ""),
        )

    def prompt(self, task: str, kind: str, *, is_document: bool) -> str:
        """What to put before a text of a task of mteb's type `kind`, its space included."""
        if is_document:
            line = self.documents
        elif task in self.tasks:
            line = self.tasks[task]
        else:
            line = self.types.get(kind, "")
            logger.info("%s has no instruction of its own: %r is used", task, line)
        return f"{line.strip()} " if line.strip() else ""


def _lines(part: Any, path: str | Path) -> dict[str, str]:
    part = part or {}
    if not isinstance(part, dict) or not all(isinstance(line, str) for line in part.values()):
        raise ConfigError(f"{path}: tasks and types are mappings of names to lines")
    return {str(name): line for name, line in part.items()}
