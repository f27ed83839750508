"""From Hugging Face safetensors and GGUF files to a Backbone.

A missing tensor, a misshapen one or one nobody reads is an error that names it.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gen_fast.errors import ConfigError, UnsupportedModelError, WeightsError
from gen_fast.io.cache import remembered, remembered_sha256
from gen_fast.io.checksums import problem
from gen_fast.io.durable import signature
from gen_fast.model.backbone import Backbone, LayerWeights
from gen_fast.model.calibration_texts import CALIBRATION_TEXTS
from gen_fast.model.choices import FP8, INT4, INT8
from gen_fast.model.config import BackboneConfig, parse_config
from gen_fast.model.fingerprint import Digests, digests_of, fingerprint, samples
from gen_fast.model.int8 import check_calibration, check_sizes, int8_layers, tokenized
from gen_fast.model.linear import Fp8Weight, Int4Weight, Int8Weight, Weight
from gen_fast.model.lora import LoraWeights
from gen_fast.model.memory import check_memory, weight_bytes
from gen_fast.model.model_files import read_json
from gen_fast.model.quantized import (
    SCALE,
    Recipe,
    check_device,
    check_quantize,
    fp8_stored_shape,
    fp8_weight,
    int4_blocks,
    read_recipe,
    scale_name,
)
from gen_fast.ops.qlinear import blocks_shape, int8_blocks_shape

logger = logging.getLogger(__name__)

# Tensors that a checkpoint may carry and that the backbone does not need.
_UNUSED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass
class TensorFiles:
    """The tensors of one checkpoint directory, known without reading them.

    adapters: merged into the tensors that they update, one after another, in float32.
    recipe: of a quantised copy.
    """

    where: Mapping[str, tuple["_Shard | _Tensors", str]]  # our name -> (holder, name there)
    mapped: bool  # tensors are views of mapped files
    adapters: tuple[LoraWeights, ...] = ()
    recipe: Recipe | None = None

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self.where)

    def backbone_names(self) -> list[str]:
        """Names of the tensors that a backbone without its head consists of."""
        unused = ("lm_head.weight", *_UNUSED_SUFFIXES)
        return [name for name in self.where if not name.endswith(unused)]

    def digests(self) -> dict[str, Digests]:
        """The digests of all tensors that count, as they are stored, without the adapters."""
        holders = {id(holder): holder for holder, _ in self.where.values()}
        found = {key: holder.digests() for key, holder in holders.items()}
        digests = {
            name: found[id(holder)][stored_name]
            for name, (holder, stored_name) in self.where.items()
            if not name.endswith(_UNUSED_SUFFIXES)
        }
        if self.recipe is not None:  # the values are the original's, what is stored its own
            values = self.recipe.digests
            digests = {
                name: (values.get(name, ""), own)
                for name, (_, own) in digests.items()
                if not name.endswith(SCALE)
            }
        return digests

    def samples(self, config: BackboneConfig) -> dict[str, str]:
        """The hashes by which earlier versions told weights apart, adapters merged."""
        return samples(config, self.get) if self.recipe is None else dict(self.recipe.samples)

    def stored(self, name: str) -> Tensor:
        """A tensor as it is in its file. Raises WeightsError if it is missing or damaged."""
        if name not in self.where:
            raise WeightsError(f"tensor {name!r} is missing")
        try:
            file, stored_name = self.where[name]
            return file.get_tensor(stored_name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"tensor {name!r} cannot be read: {error}") from error

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a tensor, adapters merged. Raises WeightsError for a missing or damaged one."""
        tensor = self.stored(name)
        if self.recipe is not None and tensor.itemsize == 1:  # of 4 or 8 bits
            raise UnsupportedModelError(
                f"tensor {name!r} is quantised: this takes the original, {self.recipe.source!r}"
            )
        if tuple(tensor.shape) != shape:
            raise WeightsError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, the config asks for {shape}"
            )
        if not tensor.is_floating_point():
            raise WeightsError(f"tensor {name!r} has dtype {tensor.dtype}, not a float")
        for adapter in self.adapters:
            tensor = adapter.merged(name.removesuffix(".weight"), tensor)
        return tensor

    def int4(self, name: str, shape: tuple[int, int]) -> Tensor:
        """The blocks of a linear's weight [out, in], adapters merged before it is quantised."""
        if self.recipe is None:
            return int4_blocks(name, self.get(name, shape))
        return self._as_written(name, torch.uint8, blocks_shape(shape))

    def int8(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Blocks and scales of a linear's weight [out, in], of a copy that has them."""
        blocks = self._as_written(name, torch.int8, int8_blocks_shape(shape))
        return blocks, self._as_written(scale_name(name), torch.float32, shape[:1])

    def fp8(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """e4m3 and scales of a linear's weight [out, in], adapters merged before."""
        if self.recipe is None:
            return fp8_weight(name, self.get(name, shape))
        q = self._as_written(name, torch.float8_e4m3fn, fp8_stored_shape(shape)).flatten(0, 1)
        return q, self._as_written(scale_name(name), torch.float32, shape[:1])

    def _as_written(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a quantised copy."""
        tensor = self.stored(name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise WeightsError(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, the config asks for "
                f"{dtype} {list(shape)}"
            )
        return tensor

    def load(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tensor:
        """`get`, converted, and in memory of its own: no file stays mapped for it."""
        return self.get(name, shape).to(device, dtype, copy=self.mapped)


def find_tensors(directory: Path) -> TensorFiles:
    """Those of model.safetensors, or the shards of its index. Names lose a leading "model.".

    Raises WeightsError, also for files that are not as the directory's checksums.json says.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is not a shard index: {error}") from error
    elif (directory / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif any(directory.glob("*.bin")):
        raise WeightsError(
            f"{directory} holds pickled .bin weights only; convert them to safetensors, "
            "pickles are never loaded"
        )
    else:
        raise WeightsError(f"{directory} holds neither model.safetensors nor its shard index")
    listed = [name for name in ("config.json", index.name, *shards) if (directory / name).is_file()]
    if wrong := problem(directory, *listed, sha256=remembered_sha256):
        raise WeightsError(wrong)
    where: dict[str, tuple[_Shard | _Tensors, str]] = {}
    for name in shards:
        path = directory / name
        if not path.is_file():
            raise WeightsError(f"shard {name} named in {index.name} is missing")
        shard = _Shard(path)
        try:
            names = shard.names()
        except SafetensorError as error:
            raise WeightsError(f"{path} is damaged: {error}") from error
        for stored in names:
            where[stored.removeprefix("model.")] = shard, stored
    return TensorFiles(where, mapped=True, recipe=read_recipe(directory))


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
    file = _Tensors(tensors)
    where = {name.removeprefix("model."): (file, name) for name in tensors}
    files = TensorFiles(where, mapped=False)
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


class _Shard:
    """A safetensors file. It is mapped anew for each tensor, which holds its mapping.

    So what has been converted, copied or joined to others leaves memory at once, and not when the
    last tensor of the file does. Raises WeightsError if the file is another one by then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state = signature(path)

    def names(self) -> list[str]:
        with safe_open(self._path, "pt") as file:
            return list(file.keys())

    def get_tensor(self, name: str) -> Tensor:
        with safe_open(self._path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        self._check_unchanged()
        return tensor

    def digests(self) -> dict[str, Digests]:
        """Of all tensors; computed again only if the file has changed since the last time."""
        try:
            found = remembered(self._path, "tensors", self._compute_digests)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{self._path} cannot be read: {error}") from error
        self._check_unchanged()
        return {name: (rounded, stored) for name, (rounded, stored) in found.items()}

    def _compute_digests(self) -> dict[str, Digests]:
        return digests_of((name, self.get_tensor(name)) for name in self.names())

    def _check_unchanged(self) -> None:
        if signature(self._path) != self._state:
            raise WeightsError(f"{self._path} has changed while it was read")


class _Tensors:
    """A state dict, read as a safetensors file is."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def digests(self) -> dict[str, Digests]:
        return digests_of(self._tensors.items())


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
        if quantize == INT4:
            blocks = [files.int4(f"{prefix}{name}", shape) for name, shape in named]
            return Int4Weight(torch.cat(blocks).to(device))
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
        if name not in expected and not name.endswith(_UNUSED_SUFFIXES)
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
