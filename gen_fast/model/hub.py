"""The files of a model from the Hub of Hugging Face, and to it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from gen_fast.errors import ModelNotFoundError

# What is fetched from the Hub: never code, never pickled weights.
_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.yml"]
# The two projections of a published llm2vec-gen checkpoint have no suffix.
_PATTERNS += ["reconstruction_mlp", "alignment_mlp"]


def download(repository: str, revision: str | None, **options: Any) -> Path:
    """The local copy of a repository; `options` are snapshot_download's.

    Raises ModelNotFoundError.
    """
    with _named(repository, revision):
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS, **options)
        )


def fetch(name: str | Path, **options: Any) -> Path:
    """A directory, or the local copy of a repository, by the mixin's `from_pretrained`.

    Raises ModelNotFoundError.
    """
    with _named(str(name), options.get("revision")):
        files: HubFiles = HubFiles.from_pretrained(name, **options)
    return files.path


@contextmanager
def _named(repository: str, revision: str | None) -> Iterator[None]:
    """Whatever the Hub does not give becomes a ModelNotFoundError that names the repository."""
    try:
        yield
    except ModelNotFoundError:
        raise
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelNotFoundError(f"cannot get {repository}{at} from the Hub: {error}") from error


class HubFiles(ModelHubMixin):  # type: ignore[misc] # mypy does not read huggingface_hub
    """Files of ours with the `push_to_hub` and `from_pretrained` of the Hub's mixin.

    write: writes all of them, config.json and README.md included, into an empty folder. path: where
    they lie, if they have been fetched.
    """

    path: Path

    def __init__(self, write: Callable[[Path], object]) -> None:
        self._write = write

    def _save_pretrained(self, save_directory: Path) -> None:
        self._write(save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **options: Any) -> "HubFiles":
        local = Path(model_id)
        path = local if local.is_dir() else download(model_id, revision, **options)
        files = cls(lambda folder: shutil.copytree(path, folder, dirs_exist_ok=True))
        files.path = path
        return files
