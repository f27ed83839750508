"""Checkpoints published by the reference package llm2vec-gen 0.1, loaded unchanged.

Layout: `encoder/` (PEFT trainable tokens), `reconstruction_mlp` and `alignment_mlp` (torch.save),
`encoder_decoder_config.json`, `run_config.yml` and the tokenizer.
"""

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gen_fast.errors import AdapterError, BackboneMismatchError
from gen_fast.model.model_files import read_json


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, as fields of `gen_fast.Adapter`."""

    special: Tensor
    n_compression: int
    backbone: str
    reconstruction: tuple[Tensor, Tensor] | None
    alignment: tuple[Tensor, Tensor] | None
    max_length: int


def is_checkpoint(directory: Path) -> bool:
    """True if `directory` looks like a checkpoint of the reference package."""
    return (directory / "encoder" / "adapter_config.json").is_file()


def read_checkpoint(directory: str | Path) -> Checkpoint:
    """Read special tokens and projections. Raises AdapterError naming what is missing or odd.

    The reference goes on without a projection whose file is missing and then computes other
    embeddings; here the run configuration says which ones there must be.
    """
    directory = Path(directory)
    run = _run_config(directory)
    special = _special_tokens(directory, run)
    return Checkpoint(
        special=special,
        n_compression=_compression_count(directory, run, len(special)),
        backbone=str(run["model_name_or_path"]),
        reconstruction=_projection(directory, run, "reconstruction_mlp"),
        alignment=_projection(directory, run, "alignment_mlp"),
        max_length=int(run.get("max_input_length") or 512),
    )


def check_embedding(directory: str | Path, embedding: Tensor) -> None:
    """Compare the embedding table that PEFT stored with the backbone's, if it stored one.

    Raises BackboneMismatchError if rows differ: the checkpoint belongs to another backbone.
    """
    path = Path(directory) / "encoder" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        stored = [name for name in file.keys() if name.endswith("base_layer.weight")]  # noqa: SIM118
        if not stored:
            return
        rows = file.get_slice(stored[0])
        count = min(rows.get_shape()[0], len(embedding)) // 2
        if rows.get_shape()[1] != embedding.shape[1] or not torch.equal(
            rows[:count].to(torch.bfloat16), embedding[:count].cpu().to(torch.bfloat16)
        ):
            raise BackboneMismatchError(
                f"{path} was trained over another embedding table than this backbone's"
            )


def _run_config(directory: Path) -> dict[str, Any]:
    path = directory / "run_config.yml"

    class Loader(yaml.SafeLoader):
        """SafeLoader that reads `!!python/...` tags as their plain value, running nothing."""

    def plain(loader: yaml.SafeLoader, _suffix: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            values = loader.construct_sequence(node)
            return values[0] if values else None
        return loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else None

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", plain)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError as error:
        raise AdapterError(f"{path} is missing") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not YAML: {error}") from error
    needed = ("model_name_or_path", "special_tokens")
    missing = [k for k in needed if not isinstance(config, dict) or not config.get(k)]
    if missing:
        raise AdapterError(f"{path} lacks {', '.join(missing)}")
    return dict(config)


def _special_tokens(directory: Path, run: dict[str, Any]) -> Tensor:
    """The trained rows, in the order in which the tokens are appended to a text."""
    config = read_json(directory / "encoder" / "adapter_config.json")
    if config.get("peft_type") != "TRAINABLE_TOKENS":
        raise AdapterError(
            f"{directory}/encoder is a PEFT adapter of type {config.get('peft_type')!r}; only "
            "TRAINABLE_TOKENS over a frozen backbone is supported"
        )
    path = directory / "encoder" / "adapter_model.safetensors"
    if not path.is_file():
        raise AdapterError(f"{path} is missing (pickled adapters are not loaded)")
    try:
        with safe_open(path, "pt") as file:
            names = [n for n in file.keys() if n.endswith("trainable_tokens_delta")]  # noqa: SIM118
            if len(names) != 1:
                raise AdapterError(
                    f"{path} holds {len(names)} trainable_tokens_delta tensors, not 1"
                )
            rows: Tensor = file.get_tensor(names[0]).float()
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a safetensors file, or damaged: {error}") from error

    indices = config.get("token_indices") or []
    ids = _token_ids(directory)
    try:
        order = [indices.index(ids[token]) for token in run["special_tokens"]]
    except (KeyError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{directory}: special tokens of run_config.yml, tokenizer.json and "
            f"adapter_config.json do not agree ({error})"
        ) from error
    if len(rows) != len(indices):
        raise AdapterError(f"{path} holds {len(rows)} token rows for {len(indices)} token ids")
    return rows[order]


def _token_ids(directory: Path) -> dict[str, int]:
    added = read_json(directory / "tokenizer.json").get("added_tokens", [])
    return {token["content"]: token["id"] for token in added}


def _compression_count(directory: Path, run: dict[str, Any], n_special: int) -> int:
    path = directory / "encoder_decoder_config.json"
    saved = read_json(path) if path.is_file() else {}
    mode = saved.get("encoding_mode", run.get("encoding_mode", "last_10_tokens"))
    match = re.fullmatch(r"last_(\d+)_tokens", str(mode))
    if match is None or not 1 <= int(match[1]) <= n_special:
        raise AdapterError(f"encoding_mode {mode!r} does not fit {n_special} special tokens")
    return int(match[1])


def _projection(directory: Path, run: dict[str, Any], name: str) -> tuple[Tensor, Tensor] | None:
    path = directory / name
    if not path.is_file():
        if run.get(f"add_{name}", True):
            raise AdapterError(
                f"{path} is missing; without this projection the embeddings would be wrong"
            )
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise AdapterError(
            f"{path} cannot be read without running code from it: {error}"
        ) from error
    try:
        config, state = saved["config"], saved["state_dict"]
        mode, size = config.get("pooling_mode", "linear"), config.get("size", 1)
        pair = state["projection.weight"].float(), state["projection.bias"].float()
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{path} is not a projection of llm2vec-gen: {error}") from error
    if mode != "linear" or size != 1:
        raise AdapterError(
            f"{path}: pooling_mode {mode!r} of size {size} is not supported, only one linear map; "
            f"config {json.dumps(config, default=str)}"
        )
    return pair
