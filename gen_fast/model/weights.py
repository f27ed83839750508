"""From Hugging Face safetensors and GGUF files to a Backbone.

A missing tensor, a misshapen one or one nobody reads is an error that names it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import ConfigError, UnsupportedModelError, WeightsError
from gen_fast.model.backbone import Backbone, LayerWeights
from gen_fast.model.calibration_texts import CALIBRATION_TEXTS
from gen_fast.model.choices import FP8, GROUP_BITS, INT8
from gen_fast.model.config import BackboneConfig, parse_config
from gen_fast.model.fingerprint import fingerprint
from gen_fast.model.int8 import check_calibration, check_sizes, int8_layers, tokenized
from gen_fast.model.linear import Fp8Weight, GroupWeight, Int8Weight, Weight
from gen_fast.model.lora import LoraWeights
from gen_fast.model.memory import check_memory, weight_bytes
from gen_fast.model.model_files import read_json
from gen_fast.model.quantized import SCALE, check_device, check_quantize
from gen_fast.model.tensor_files import UNUSED_SUFFIXES, TensorFiles, find_tensors


def load_backbone(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    packed: bool = False,
    adapters: Sequence[LoraWeights] = (),
    bidirectional: bool = False,
    quantize: str | None = None,
    calibration: Sequence[str] = CALIBRATION_TEXTS,
) -> Backbone:
    """Read a Hugging Face safetensors directory (sharded or not) into a Backbone.

    packed: for inference only, laid out for fast products (see LayerWeights.packed).
    quantize: one of QUANTIZED, for the matrices of the layers; a quantised copy has its own.
    calibration: at least 20 texts on which inputs are measured for int8: see int8.py. The
    whole model is in memory in float32 meanwhile.
    adapters: merged into the weights, one after another, in float32, before these are converted to
    `dtype`; the fingerprint is that of the merged weights. bidirectional: see `parse_config`.
    Raises UnsupportedModelError for a config the backbone cannot compute, WeightsError for
    damaged, missing, misshapen or unexpected tensors, BackboneMismatchError for an adapter of
    another backbone, ConfigError for fp8 on a device without it, DeviceMemoryError where the
    weights take more than a GPU has free.
    """
    directory = Path(directory)
    config = parse_config(read_json(directory / "config.json"), bidirectional=bidirectional)
    files = _merged(directory, config, adapters)
    quantize = _quantization(directory, files, quantize)
    check_device(quantize, device, dtype)
    if quantize != INT8 or files.recipe is not None:
        check_memory(weight_bytes(config, dtype, quantize), device, str(directory))
        return _build(config, files, dtype, device, packed, quantize)
    check_sizes(config)
    check_calibration(calibration)
    sequences = tokenized(directory, calibration)
    name = f"{directory}, which is measured in float32 before it becomes int8,"
    check_memory(weight_bytes(config, torch.float32), device, name)
    wide = _build(config, files, torch.float32, device, packed=False)
    layers = int8_layers(wide, sequences, "bidirectional" if bidirectional else "causal")
    return Backbone(
        config,
        wide.embedding.to(dtype),
        tuple(layer.cast(dtype) for layer in layers),
        wide.final_norm.to(dtype),
        wide.fingerprint,
    )


def _quantization(directory: Path, files: TensorFiles, quantize: str | None) -> str | None:
    """What a backbone's matrices are to be. Raises ConfigError."""
    check_quantize(quantize)
    if files.recipe is None:
        return quantize
    if quantize is not None:
        raise ConfigError(
            f"{directory} is quantised already, to {files.recipe.quantize}: load it without "
            "quantize"
        )
    return files.recipe.quantize


def read_fingerprint(
    directory: str | Path, *, adapters: Sequence[LoraWeights] = (), bidirectional: bool = False
) -> dict[str, str | int | float]:
    """The fingerprint that a directory's backbone would have, without loading its layers.

    adapters, bidirectional: of `load_backbone`, as which it raises.
    """
    directory = Path(directory)
    config = parse_config(read_json(directory / "config.json"), bidirectional=bidirectional)
    files = _merged(directory, config, adapters)
    return _fingerprint(config, files)


def backbone_from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Backbone:
    """Build a Backbone from a config.json's content and a transformers state dict in memory.

    Raises as `load_backbone` does.
    """
    files = TensorFiles.of_state_dict(tensors)
    return _build(parse_config(config), files, dtype, device, packed=False)


def _merged(
    directory: Path, config: BackboneConfig, adapters: Sequence[LoraWeights]
) -> TensorFiles:
    for adapter in adapters:
        adapter.check_backbone(config)
    files = find_tensors(directory)
    if adapters and files.recipe is not None:
        raise UnsupportedModelError(
            f"{directory} is quantised, and the adapter has to be merged before: load it over "
            f"{files.recipe.source!r} with quantize={files.recipe.quantize!r}"
        )
    return replace(files, adapters=tuple(adapters))


def _build(
    config: BackboneConfig,
    files: TensorFiles,
    dtype: torch.dtype,
    device: torch.device | str,
    packed: bool,
    quantize: str | None = None,
) -> Backbone:
    _refuse_unexpected(files, config)
    shape = config.vocab_size, config.hidden_size
    embedding = files.load("embed_tokens.weight", shape, dtype, device)
    layers = []
    for i in range(config.num_layers):
        layer = _load_layer(files, config, f"layers.{i}.", dtype, device, quantize)
        # At once, while the layer is in the caches, and so that no more is in memory twice.
        layers.append(layer.packed() if packed else layer)
    final_norm = files.load("norm.weight", (config.hidden_size,), dtype, device)
    return Backbone(config, embedding, tuple(layers), final_norm, _fingerprint(config, files))


def _load_layer(
    files: TensorFiles,
    config: BackboneConfig,
    prefix: str,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: str | None,
) -> LayerWeights:
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    widths = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}

    def get(name: str, *shape: int) -> Tensor:
        return files.load(f"{prefix}{name}", shape, dtype, device)

    def join(parts: Iterable[tuple[str, tuple[int, ...]]]) -> Tensor:
        return torch.cat([files.get(f"{prefix}{n}", s).to(device, dtype) for n, s in parts])

    def matrix(parts: Mapping[str, tuple[int, int]]) -> Weight:
        """One below the other, by name."""
        named = [(f"{name}_proj.weight", shape) for name, shape in parts.items()]
        if quantize is None:
            return join(named)
        if quantize in GROUP_BITS:
            blocks = [files.groups(f"{prefix}{name}", shape, quantize) for name, shape in named]
            return GroupWeight(quantize, torch.cat(blocks).to(device))
        read, kind = (files.int8, Int8Weight) if quantize == INT8 else (files.fp8, Fp8Weight)
        both = zip(*(read(f"{prefix}{name}", shape) for name, shape in named), strict=True)
        return kind(*(torch.cat(tensors).to(device) for tensors in both))

    qkv_bias = qk_norm = None
    if config.qkv_bias:
        qkv_bias = join((f"self_attn.{n}_proj.bias", (w,)) for n, w in widths.items())
    if config.qk_norm:
        q_norm, k_norm = get("self_attn.q_norm.weight", d), get("self_attn.k_norm.weight", d)
        qk_norm = torch.cat(
            (q_norm.expand(config.num_heads, d), k_norm.expand(config.num_kv_heads, d))
        )
    return LayerWeights(
        attention_norm=get("input_layernorm.weight", h),
        qkv=matrix({f"self_attn.{n}": (w, h) for n, w in widths.items()}),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        out=matrix({"self_attn.o": (h, config.q_size)}),
        mlp_norm=get("post_attention_layernorm.weight", h),
        gate_up=matrix({f"mlp.{n}": (f, h) for n in ("gate", "up")}),
        down=matrix({"mlp.down": (h, f)}),
    )


def _refuse_unexpected(files: TensorFiles, config: BackboneConfig) -> None:
    expected = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    layer = ["input_layernorm", "post_attention_layernorm"]
    layer += [f"self_attn.{n}_proj" for n in "qkvo"] + [
        f"mlp.{n}_proj" for n in ("gate", "up", "down")
    ]
    layer += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else []
    names = [f"{module}.weight" for module in layer]
    names += [f"self_attn.{n}_proj.bias" for n in "qkv"] if config.qkv_bias else []
    if files.recipe is not None and files.recipe.quantize in (INT8, FP8):
        names += [f"{module}{SCALE}" for module in layer if module.endswith("_proj")]
    expected |= {f"layers.{i}.{name}" for i in range(config.num_layers) for name in names}
    unexpected = sorted(
        name
        for name in files.names()
        if name not in expected and not name.endswith(UNUSED_SUFFIXES)
    )
    if unexpected:
        raise WeightsError(
            f"{len(unexpected)} tensors are not part of a {config.family} backbone as its config "
            f"describes it, such as {unexpected[0]!r}"
        )


def _fingerprint(config: BackboneConfig, files: TensorFiles) -> dict[str, str | int | float]:
    # After the adapters' own factors no more need be said of what they make of the weights.
    merged = [adapter.sha256() for adapter in files.adapters]
    return {
        **fingerprint(config, files.digests(), merged),
        **files.samples(config),
    }


def load_head(directory: str | Path, backbone: Backbone) -> Tensor:
    """Return the language-model head [V, h]: the embedding itself where it is tied.

    Raises WeightsError and DeviceMemoryError as `load_backbone` does.
    """
    if backbone.config.tied_head:
        return backbone.embedding
    shape = tuple(backbone.embedding.shape)
    files = find_tensors(Path(directory))
    size = {str(backbone.dtype).removeprefix("torch."): math.prod(shape) * backbone.dtype.itemsize}
    check_memory(size, backbone.device, f"the head of {directory}")
    return files.load("lm_head.weight", shape, backbone.dtype, backbone.device)
