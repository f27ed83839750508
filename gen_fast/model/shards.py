"""Tensors to safetensors files of a bounded size, with an index where there are several."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from gen_fast.io.durable import as_readable_as_others

# Weights are written in files of at most this size: what is in memory meanwhile.
SHARD_BYTES = 1 << 30


def save_shards(directory: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor]) -> None:
    """Write model.safetensors, or several files and model.safetensors.index.json.

    sizes: bytes of each tensor by its name, in the order of the files. read: gives the tensor of a
    name; those of one file are held at a time.
    """
    shards = list(_shards(sizes))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = "" if len(shards) == 1 else f"-{number:05}-of-{len(shards):05}"
        path = directory / f"model{part}.safetensors"
        with as_readable_as_others(path):
            # Without the format older releases of transformers refuse the file.
            save_file({name: read(name) for name in names}, path, metadata={"format": "pt"})
        where |= dict.fromkeys(names, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shards(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in their order, in parts of at most SHARD_BYTES, or of one larger tensor."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names
