"""GEM models: a LoRA adapter as PEFT lays it out, or a whole model, and beside it special tokens.

special.safetensors has "special" [m, h] and "log_scale", gem.json how texts are embedded. Without
either the directory is one of PEFT's or transformers' that generates.
Source: GEM, arXiv 2506.04344.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen_fast.errors import AdapterError, UnsupportedModelError, WeightsError
from gen_fast.formats.peft import is_adapter
from gen_fast.io.checksums import problem, record
from gen_fast.io.durable import as_readable_as_others, file_sha256, replacing, write_whole
from gen_fast.model.model_files import read_json

SETTINGS = "gem.json"
TENSORS = "special.safetensors"
FORMAT = "gen_fast.gem/1"
POOLINGS = ("mean", "concat")


@dataclass(frozen=True)
class Settings:
    """gem.json: how texts are embedded.

    n_special: tokens behind a text. pooling: of their states, "mean" or "concat". max_length:
    tokens of a text, the special ones counted. form: that the model was trained in, for the record.
    """

    n_special: int
    pooling: str = "mean"
    max_length: int = 512
    form: str = "reconstruct"


@dataclass(frozen=True)
class SpecialTokens:
    """What lies beside the adapter or the weights.

    special [m, h]: float32. log_scale: λ of the cosines.
    """

    special: Tensor
    log_scale: float
    settings: Settings


def is_gem(directory: Path) -> bool:
    """Whether a directory holds a GEM model."""
    return (directory / SETTINGS).is_file()


def read_special(directory: str | Path) -> SpecialTokens:
    """Read what lies beside the adapter or the weights.

    Raises AdapterError for what is missing, damaged or without meaning, UnsupportedModelError for
    another format.
    """
    directory = Path(directory)
    settings = _settings(directory / SETTINGS)
    if wrong := problem(directory, SETTINGS, TENSORS):
        raise AdapterError(wrong)
    if not is_adapter(directory) and not (directory / "config.json").is_file():
        raise AdapterError(
            f"{directory} has {SETTINGS} without the adapter or the model that it belongs to"
        )
    path = directory / TENSORS
    if not path.is_file():
        raise AdapterError(f"{path} is missing")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a safetensors file, or damaged: {error}") from error
    if set(tensors) != {"special", "log_scale"}:
        raise AdapterError(f"{path} holds {sorted(tensors)}, not special and log_scale")
    special, log_scale = tensors["special"].float(), float(tensors["log_scale"])
    if special.ndim != 2 or len(special) != settings.n_special:
        raise AdapterError(
            f"{path}: special has shape {list(special.shape)}, {SETTINGS} says "
            f"{settings.n_special} rows"
        )
    if not torch.isfinite(special).all() or not math.isfinite(log_scale):
        raise AdapterError(f"{path} is not all finite floats")
    return SpecialTokens(special, log_scale, settings)


def write_special(directory: str | Path, tokens: SpecialTokens) -> None:
    """Write what lies beside an adapter or weights: the rest has been written before.

    By `write_adapter` of peft.py, or `write_causal_lm` of causal_lm.py.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        "special": tokens.special.detach().float().cpu().contiguous(),
        "log_scale": torch.tensor(tokens.log_scale, dtype=torch.float32),
    }
    with replacing(directory / TENSORS) as path, as_readable_as_others(path):
        save_file(tensors, path)
    values = {"format": FORMAT, **asdict(tokens.settings)}
    write_whole(directory / SETTINGS, json.dumps(values, indent=2) + "\n")
    record(directory, {name: file_sha256(directory / name) for name in (TENSORS, SETTINGS)})


def _settings(path: Path) -> Settings:
    try:
        values = read_json(path)
    except WeightsError as error:
        raise AdapterError(str(error)) from error
    if values.pop("format", None) != FORMAT:
        raise UnsupportedModelError(f"{path} is not of format {FORMAT!r}")
    types = {field.name: field.type for field in fields(Settings)}
    if set(values) != set(types):
        raise AdapterError(f"{path} has keys {sorted(values)}, expected {sorted(types)}")
    for name, kind in types.items():
        if type(values[name]) is not kind:
            raise AdapterError(f"{path}: {name} {values[name]!r} has no meaning")
    settings = Settings(**values)
    if settings.pooling not in POOLINGS or not 0 < settings.n_special < settings.max_length:
        raise AdapterError(f"{path}: {settings} has no meaning")
    return settings
