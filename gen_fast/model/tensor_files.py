"""The tensors of a checkpoint directory: where they are, and each as what it is asked for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gen_fast.errors import UnsupportedModelError, WeightsError
from gen_fast.io.cache import remembered, remembered_sha256
from gen_fast.io.checksums import problem
from gen_fast.io.durable import signature
from gen_fast.model.choices import GROUP_BITS
from gen_fast.model.config import BackboneConfig
from gen_fast.model.fingerprint import Digests, digests_of, samples
from gen_fast.model.lora import LoraWeights
from gen_fast.model.model_files import read_json
from gen_fast.model.quantized import (
    SCALE,
    Recipe,
    fp8_stored_shape,
    fp8_weight,
    group_blocks,
    read_recipe,
    scale_name,
)
from gen_fast.ops.qlinear import group_blocks_shape, int8_blocks_shape

# Tensors that a checkpoint may carry and that the backbone does not need.
UNUSED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass
class TensorFiles:
    """The tensors of one checkpoint directory, known without reading them.

    adapters: merged into the tensors that they update, one after another, in float32.
    recipe: of a quantised copy.
    """

    where: Mapping[str, tuple["_Shard | _StateDict", str]]  # our name -> (holder, name there)
    mapped: bool  # tensors are views of mapped files
    adapters: tuple[LoraWeights, ...] = ()
    recipe: Recipe | None = None

    @classmethod
    def of_state_dict(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Those of a model in memory. Names lose a leading "model."."""
        held = _StateDict(tensors)
        where = {name.removeprefix("model."): (held, name) for name in tensors}
        return cls(where, mapped=False)

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self.where)

    def backbone_names(self) -> list[str]:
        """Names of the tensors that a backbone without its head consists of."""
        unused = ("lm_head.weight", *UNUSED_SUFFIXES)
        return [name for name in self.where if not name.endswith(unused)]

    def digests(self) -> dict[str, Digests]:
        """The digests of all tensors that count, as they are stored, without the adapters."""
        holders = {id(holder): holder for holder, _ in self.where.values()}
        found = {key: holder.digests() for key, holder in holders.items()}
        digests = {
            name: found[id(holder)][stored_name]
            for name, (holder, stored_name) in self.where.items()
            if not name.endswith(UNUSED_SUFFIXES)
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

    def groups(self, name: str, shape: tuple[int, int], quantize: str) -> Tensor:
        """The blocks of a linear's weight [out, in], adapters merged before it is quantised.

        quantize: one of GROUP_BITS.
        """
        if self.recipe is None:
            return group_blocks(name, self.get(name, shape), quantize)
        return self._as_written(name, torch.uint8, group_blocks_shape(shape, GROUP_BITS[quantize]))

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
    where: dict[str, tuple[_Shard | _StateDict, str]] = {}
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


class _StateDict:
    """A state dict, read as a safetensors file is."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def digests(self) -> dict[str, Digests]:
        return digests_of(self._tensors.items())
