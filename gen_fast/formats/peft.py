"""LoRA adapters as PEFT lays them out: adapter_config.json and adapter_model.safetensors.

A key that changes the computation and is not supported is an error that names it; the keys that
are read are a closed list. Source: peft 0.21, LoraConfig and save_pretrained.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen_fast.errors import (
    AdapterError,
    BackboneMismatchError,
    ConfigError,
    UnsupportedModelError,
    WeightsError,
)
from gen_fast.io.checksums import CHECKSUMS, problem, record
from gen_fast.io.durable import as_readable_as_others, file_sha256, replacing, write_whole
from gen_fast.model.fingerprint import Fingerprint, described, differences
from gen_fast.model.lora import MODULES, Factors, LoraConfig, LoraWeights
from gen_fast.model.model_files import read_json
from gen_fast.model.sources import is_hub_id

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Ours, beside PEFT's: the adapter lies straight over what its config names, whose fingerprint this
# may have.
TRAINED_OVER = "gen_fast.json"
FORMAT = "gen_fast.lora/1"

# Keys that are read, and keys that do not change what a trained adapter computes.
_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "base_model_name_or_path",
    "revision",
}
_WITHOUT_EFFECT = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "megatron_core",  # of megatron_config, which is refused
    "qalora_group_size",  # of use_qalora, which is refused
}
# Values with which keys ask for nothing. Others than these keys must be off: null, false or empty.
_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Other ways to begin (pissa, olora, loftq, …) change the base weights too.
    "init_lora_weights": (True, False, None, "gaussian"),
}
# In front of "layers.3.…": a causal language model holds the decoder as `model`.
_ROOTS = ("base_model.model.model.", "base_model.model.")


@dataclass(frozen=True)
class PeftAdapter:
    """What an adapter's directory says.

    base: the model it was trained on, a path or Hub id, or None if the directory names none;
    revision: of that. fingerprint: of that model's weights, in directories that gen_fast writes.
    """

    weights: LoraWeights
    base: str | None
    revision: str | None
    fingerprint: Fingerprint | None = None

    def check_fingerprint(self, actual: Fingerprint) -> None:
        """Raise BackboneMismatchError if it was trained over weights of another fingerprint."""
        recorded = self.fingerprint or {}
        found = differences(recorded, actual)
        if found:
            raise BackboneMismatchError(
                "the adapter was trained over other weights than these: they differ in "
                f"{described(found, recorded, actual)}"
            )


def is_adapter(directory: Path) -> bool:
    """Whether `directory` looks like an adapter of PEFT."""
    return (directory / CONFIG).is_file()


def read_base(directory: str | Path) -> tuple[str | None, str | None]:
    """Name and revision of the model that an adapter was trained on. Raises as `read_adapter`."""
    return _base(_object(Path(directory) / CONFIG))


def read_auto_class(directory: str | Path) -> str | None:
    """Name of the class that an adapter was trained on, where its config keeps one."""
    mapping = _object(Path(directory) / CONFIG).get("auto_mapping")
    return str(mapping.get("base_model_class")) if isinstance(mapping, dict) else None


def read_adapter(directory: str | Path) -> PeftAdapter:
    """Read a LoRA adapter.

    Raises UnsupportedModelError naming a key that asks for more than LoRA on the linears of the
    backbone, AdapterError for a directory that is damaged, incomplete or pickled.
    """
    directory = Path(directory)
    values = _object(directory / CONFIG)
    if wrong := problem(directory, CONFIG, TENSORS, TRAINED_OVER):
        raise AdapterError(wrong)
    config = _lora_config(values, directory / CONFIG)
    factors = _factors(_tensors(directory), config, directory / TENSORS)
    base, revision = _base(values)
    return PeftAdapter(LoraWeights(config, factors), base, revision, _fingerprint(directory))


def write_adapter(
    directory: str | Path,
    weights: LoraWeights,
    *,
    base: str,
    revision: str | None = None,
    fingerprint: Fingerprint | None = None,
    causal_lm: bool = True,
    tags: tuple[str, ...] = (),
) -> None:
    """Write a directory that `peft.PeftModel.from_pretrained` reads; `read_adapter` gives the same.

    base: path or Hub id of the model that the adapter was trained on, which may be another
    adapter's directory; fingerprint: of that model's weights, kept in a file of ours. causal_lm:
    the adapter is for an AutoModelForCausalLM; otherwise for the decoder alone, an AutoModel.
    tags: of the model card. The config is written last, so that a directory with one is whole.
    What belongs to the adapter and is no part of it, such as settings, is written afterwards.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    root = _ROOTS[0] if causal_lm else _ROOTS[1]
    tensors = {
        f"{root}{name}.lora_{letter}.weight": factor.detach().cpu().contiguous()
        for name, pair in weights.factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    config = weights.config
    alpha = config.alpha
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal_lm else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
        "target_modules": list(config.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (directory / CONFIG).unlink(missing_ok=True)
    (directory / CHECKSUMS).unlink(missing_ok=True)
    with replacing(directory / TENSORS) as path, as_readable_as_others(path):
        save_file(tensors, path, {"format": "pt"})
    over = {"format": FORMAT, "backbone": {"fingerprint": fingerprint and dict(fingerprint)}}
    write_whole(directory / TRAINED_OVER, json.dumps(over, indent=2) + "\n")
    write_whole(directory / "README.md", _model_card(base, config, tags))
    text = json.dumps(values, indent=2) + "\n"
    checksums = {name: file_sha256(directory / name) for name in (TENSORS, TRAINED_OVER)}
    record(directory, {**checksums, CONFIG: hashlib.sha256(text.encode()).hexdigest()})
    write_whole(directory / CONFIG, text)


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except WeightsError as error:
        raise AdapterError(f"not an adapter: {error}") from error


def _fingerprint(directory: Path) -> Fingerprint | None:
    path = directory / TRAINED_OVER
    if not path.is_file():
        return None
    values = _object(path)
    fingerprint = (values.get("backbone") or {}).get("fingerprint")
    if values.get("format") != FORMAT or not isinstance(fingerprint, dict | None):
        raise AdapterError(f"{path} is not a {FORMAT!r} file with a fingerprint, or null")
    return fingerprint


def _base(values: Mapping[str, Any]) -> tuple[str | None, str | None]:
    return values.get("base_model_name_or_path") or None, values.get("revision") or None


def _lora_config(values: Mapping[str, Any], path: Path) -> LoraConfig:
    if values.get("peft_type") != "LORA":
        raise UnsupportedModelError(
            f"{path}: peft_type {values.get('peft_type')!r} is not supported, only 'LORA'"
        )
    for key, value in values.items():
        if key not in _READ | _WITHOUT_EFFECT and not _asks_for_nothing(key, value):
            raise UnsupportedModelError(f"{path}: {key} {value!r} is not supported")
    modules = values.get("target_modules")
    if isinstance(modules, str) or not isinstance(modules, list | tuple):
        raise UnsupportedModelError(
            f"{path}: target_modules {modules!r} is not supported, only a list of names"
        )
    unknown = sorted({str(name) for name in modules} - set(MODULES))
    if unknown or not modules:
        raise UnsupportedModelError(
            f"{path}: target_modules {', '.join(unknown) or 'of no name'} is not supported, only "
            f"{', '.join(MODULES)}"
        )
    try:
        return LoraConfig(
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            dropout=float(values.get("lora_dropout") or 0.0),
            modules=tuple(name for name in MODULES if name in modules),
            rank_stabilized=bool(values.get("use_rslora")),
        )
    except KeyError as error:
        raise AdapterError(f"{path} lacks the key {error.args[0]!r}") from error
    except (TypeError, ValueError, ConfigError) as error:
        raise AdapterError(f"{path} holds a value that has no meaning: {error}") from error


def _asks_for_nothing(key: str, value: Any) -> bool:
    if key in _OFF:
        # `is`, because 1 == True.
        return any(value is off or (isinstance(off, str) and value == off) for off in _OFF[key])
    return value is None or value is False or value in ("", [], {})


def _tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / TENSORS
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            raise AdapterError(
                f"{directory} holds a pickled adapter_model.bin only; pickles are never loaded: "
                f"convert it to {TENSORS}"
            )
        raise AdapterError(f"{path} is missing")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a safetensors file, or damaged: {error}") from error
    return tensors


def _factors(tensors: Mapping[str, Tensor], config: LoraConfig, path: Path) -> dict[str, Factors]:
    """A and B by the name of their linear, in the order of the file."""
    halves: dict[str, dict[str, Tensor]] = {}
    root = next((root for root in _ROOTS if all(name.startswith(root) for name in tensors)), "")
    for stored, tensor in tensors.items():
        name, _, kind = stored.removeprefix(root).rpartition(".lora_")
        module = name.rpartition(".")[2]
        if not root or kind not in ("A.weight", "B.weight") or module not in config.modules:
            raise AdapterError(f"{path} holds {stored!r}, which is no factor of its config's")
        axis = 0 if kind[0] == "A" else 1
        if tensor.ndim != 2 or tensor.shape[axis] != config.rank:
            raise AdapterError(
                f"{path}: {stored!r} has shape {list(tensor.shape)}, its config says rank "
                f"{config.rank}"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {stored!r} is not all finite floats")
        halves.setdefault(name, {})[kind[0]] = tensor.float()
    single = [name for name, pair in halves.items() if len(pair) != 2]
    if single or not halves:
        raise AdapterError(
            f"{path} has only one of the factors of {single[0]!r}"
            if single
            else f"{path} holds no factors"
        )
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}


def _model_card(base: str, config: LoraConfig, tags: tuple[str, ...]) -> str:
    from huggingface_hub import ModelCardData

    # The Hub refuses a card whose base model is none of its own.
    data = ModelCardData(
        library_name="peft",
        base_model=base if is_hub_id(base) else None,
        tags=["lora", *tags],
    )
    return f"""---
{data.to_yaml()}
---
# LoRA adapter for {base}

Rank {config.rank}, alpha {config.alpha:g}, on {", ".join(config.modules)}. Trained by gen_fast.
"""
