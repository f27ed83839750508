"""Modules of sentence-transformers that follow a Transformer: what they compute, their files.

Source: sentence-transformers 6.2, whose reading of these files, defaults included, is followed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gen_fast.errors import UnsupportedModelError, WeightsError
from gen_fast.model.linear import linear, pack
from gen_fast.model.model_files import read_json

POOLING_MODES = ("mean", "lasttoken", "cls", "weightedmean", "max", "mean_sqrt_len_tokens")

# The flags of older releases.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "Identity",
    "torch.nn.Identity": "Identity",
    "torch.nn.modules.activation.Tanh": "Tanh",
    "torch.nn.Tanh": "Tanh",
}


@dataclass(frozen=True)
class Pooling:
    """How the states of a text's tokens become one vector; `mode` is one of POOLING_MODES.

    Prompt and special tokens count as all others do, unless include_prompt is false.
    counted [V] bool: the ids that count in a mean, as WordWeights says; None is all of them.
    """

    mode: str
    include_prompt: bool = True
    counted: np.ndarray | None = None

    def identity(self) -> dict[str, Any]:
        """What decides its numbers, as JSON."""
        values = {"pooling": self.mode, "include_prompt": self.include_prompt}
        if self.counted is None:
            return values
        return {**values, "counted": hashlib.sha256(self.counted.tobytes()).hexdigest()[:16]}


@dataclass(frozen=True)
class Dense:
    """activation(weight @ x + bias). weight [out, in], bias [out]; activation Identity or Tanh."""

    weight: Tensor
    bias: Tensor | None
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        """Embeddings [n, in] to [n, out]."""
        x = linear(x, self.weight, self.bias)
        return x.tanh() if self.activation == "Tanh" else x

    def to(self, device: torch.device) -> "Dense":
        """The same with its weights on `device`, packed there."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=pack(self.weight.to(device)), bias=bias)

    def identity(self) -> dict[str, Any]:
        """What decides its numbers, as JSON."""
        digest = hashlib.sha256(self.weight.cpu().numpy().tobytes())
        if self.bias is not None:
            digest.update(b"bias" + self.bias.cpu().numpy().tobytes())
        return {
            "type": "Dense",
            "shape": list(self.weight.shape),
            "activation": self.activation,
            "sha256": digest.hexdigest()[:16],
        }


@dataclass(frozen=True)
class Normalize:
    """Division by the L2 norm."""

    def __call__(self, x: Tensor) -> Tensor:
        """Embeddings [n, d] of length 1."""
        return torch.nn.functional.normalize(x, dim=-1)

    def to(self, device: torch.device) -> "Normalize":
        """The same: it has no weights."""
        return self

    def identity(self) -> dict[str, Any]:
        """What decides its numbers, as JSON."""
        return {"type": "Normalize"}


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file. Raises WeightsError if it is damaged."""
    return read_json(path) if path.is_file() else {}


def read_word_weights(path: Path, vocab_size: int) -> np.ndarray:
    """The ids that count, [V] bool, by the WordWeights in a folder.

    Raises UnsupportedModelError for weights other than 0 and 1, WeightsError for missing ones.
    """
    weights = _read_tensors(path).get("emb_layer.weight")
    if weights is None or weights.ndim != 2 or weights.shape[0] < vocab_size:
        raise WeightsError(f"{path}/model.safetensors does not hold a weight for each token")
    counted = weights[:, 0] == 1
    if not (counted | (weights[:, 0] == 0)).all():
        raise UnsupportedModelError(f"{path}: weights other than 0 and 1 are not supported")
    return counted.numpy()


def read_pooling(path: Path, hidden_size: int, counted: np.ndarray | None) -> Pooling:
    """The Pooling in a folder, behind states of `hidden_size`, of which `counted` ids count.

    Raises UnsupportedModelError.
    """
    config = read_json(path / "config.json")
    flags = {name: config.pop(name) for name in POOLING_FLAGS if name in config}
    mode = config.pop("pooling_mode", None)
    if mode is None:
        mode = [POOLING_FLAGS[name] for name, is_set in flags.items() if is_set] or "mean"
    modes = [mode] if isinstance(mode, str) else list(mode)
    width = config.pop("embedding_dimension", None)
    width = config.pop("word_embedding_dimension", width)
    include_prompt = config.pop("include_prompt", True)
    _refuse_unknown(config, path)
    if len(modes) != 1 or modes[0] not in POOLING_MODES:
        raise UnsupportedModelError(
            f"{path}: pooling_mode {', '.join(map(repr, modes))} is not supported, only one of "
            f"{', '.join(POOLING_MODES)}"
        )
    if width is not None and width != hidden_size:
        raise UnsupportedModelError(
            f"{path}: embedding_dimension {width} is not the backbone's {hidden_size}"
        )
    if counted is not None and (modes[0] != "mean" or not include_prompt):
        raise UnsupportedModelError(
            f"{path}: behind WordWeights only the mean is supported, with include_prompt"
        )
    return Pooling(modes[0], bool(include_prompt), counted)


def read_dense(path: Path, size: int, of: str = "sentence_embedding") -> Dense:
    """The Dense in a folder, behind vectors of `size`: those of texts, or "token_embeddings".

    Raises UnsupportedModelError, and WeightsError for weights that are missing or misshapen.
    """
    config = read_json(path / "config.json")
    _check_features(config, path, of)
    if config.pop("use_residual", False):
        raise UnsupportedModelError(f"{path}: a Dense with use_residual is not supported")
    activation = config.pop("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{path}: activation_function {activation!r} is not supported, only "
            f"{' and '.join(sorted(set(_ACTIVATIONS.values())))}"
        )
    shape = config.pop("out_features", None), config.pop("in_features", None)
    has_bias = bool(config.pop("bias", True))
    _refuse_unknown(config, path)
    if shape[1] != size:
        raise UnsupportedModelError(f"{path}: in_features {shape[1]} meets vectors of size {size}")
    tensors = _read_tensors(path)
    weight, bias = tensors.pop("linear.weight", None), tensors.pop("linear.bias", None)
    if (
        tensors
        or weight is None
        or tuple(weight.shape) != shape
        or (bias is not None) != has_bias
        or (bias is not None and tuple(bias.shape) != shape[:1])
    ):
        raise WeightsError(f"{path}/model.safetensors does not hold a linear map of shape {shape}")
    return Dense(weight.float(), None if bias is None else bias.float(), _ACTIVATIONS[activation])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors"
    if not file.is_file():
        pickled = ": its pickled pytorch_model.bin is not loaded, convert it to safetensors"
        has_pickle = (path / "pytorch_model.bin").is_file()
        raise WeightsError(f"{file} is missing" + (pickled if has_pickle else ""))
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise WeightsError(f"{file} is not a safetensors file, or damaged: {error}") from error
    return tensors


def read_normalize(path: Path) -> Normalize:
    """The Normalize in a folder; raises UnsupportedModelError for one of anything else."""
    config = read_optional(path / "config.json")
    _check_features(config, path, "sentence_embedding")
    _refuse_unknown(config, path)
    return Normalize()


def _check_features(config: dict[str, Any], path: Path, of: str) -> None:
    """Take the names of what a module reads and writes out of `config`: both must be `of`."""
    value = "sentence_embedding"
    for key in ("module_input_name", "module_output_name"):
        value = config.pop(key, None) or value
        if value != of:
            raise UnsupportedModelError(f"{path}: {key} {value!r} is not supported")


def _refuse_unknown(config: Mapping[str, Any], path: Path) -> None:
    if config:
        raise UnsupportedModelError(
            f"{path}/config.json: {', '.join(sorted(config))} is not supported"
        )
