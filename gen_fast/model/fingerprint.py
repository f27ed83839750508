"""Which model this is: a digest of every tensor, and every setting that changes a number."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.config import BackboneConfig

Fingerprint = Mapping[str, str | int | float]

# Of a tensor: a digest of its values in bfloat16, and one of what is stored.
Digests = tuple[str, str]

# Keys that tell a copy in another dtype, or made for longer texts, from the original. Both are the
# same model to an adapter; a job or a training run goes on with the very same numbers only.
_OF_ONE_COPY = ("stored_sha256", "max_positions")
_HEAD = "lm_head.weight"
# Fields of a config that are not told as they are; the head is one of the tensors, or is none.
_OTHERWISE = ("tied_head", "windows")
_MERGED = "adapters_sha256"
_DIGITS = 16
_THREADS = 4


def digests_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Digests]:
    """The digests of tensors on the CPU by their names; several are computed at a time."""
    # hashlib and torch both leave Python alone meanwhile.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(pool.map(lambda pair: (pair[0], _digests(pair[1])), tensors))


def _digests(tensor: Tensor) -> Digests:
    tensor = tensor.detach().cpu()
    rounded = hashlib.sha256(_bytes(tensor.to(torch.bfloat16))).hexdigest()
    stored = rounded
    if tensor.dtype != torch.bfloat16:
        stored = hashlib.sha256(_bytes(tensor)).hexdigest()
    return rounded, f"{tensor.dtype} {stored}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def fingerprint(
    config: BackboneConfig, digests: Mapping[str, Digests], merged: Iterable[str] = ()
) -> dict[str, str | int | float]:
    """Identify a set of weights, however they are sharded.

    digests: of every tensor of the backbone and of its head by name, as `digests_of` gives them.
    merged: a hash of each adapter that is merged into the weights, in their order.

    One key is a setting, or a tensor of all layers ("layers.*.…"), so that what differs can be
    named. These are of the values in bfloat16, so that a bfloat16 copy of float32 weights is the
    same model; "stored_sha256" is of the very bytes.
    """
    values: dict[str, str | int | float] = {
        **{name: _plain(value) for name, value in vars(config).items() if name not in _OTHERWISE},
        "windows": _runs(config.windows),
    }
    names = sorted(name for name in digests if name != _HEAD or not config.tied_head)
    for role in sorted({_role(name) for name in names}):
        lines = [f"{name} {digests[name][0]}" for name in names if _role(name) == role]
        values[role] = _hash(lines)
    values["stored_sha256"] = _hash(f"{name} {digests[name][1]}" for name in names)
    if hashes := " ".join(merged):
        values[_MERGED] = hashes
    return values


def samples(
    config: BackboneConfig, read: Callable[[str, tuple[int, ...]], Tensor]
) -> dict[str, str]:
    """The two hashes by which earlier versions told weights apart, for adapters of theirs.

    read: gives a tensor of a name and shape, adapters merged.
    """
    h, last = config.hidden_size, config.num_layers - 1
    embedding = read("embed_tokens.weight", (config.vocab_size, h))
    rows = [embedding[:: max(1, config.vocab_size // 64)]]
    columns = [
        read(f"layers.{i}.mlp.down_proj.weight", (h, config.intermediate_size))[:, :8]
        for i in (last // 2, last)
    ]
    return {
        name: _sampled(parts)
        for name, parts in (("embedding_sha256", rows), ("layers_sha256", columns))
    }


def differences(
    recorded: Fingerprint, actual: Fingerprint, *, same_copy: bool = False
) -> list[str]:
    """The keys in which a model is another than the recorded one.

    same_copy: also in what an adapter does not care about. Only what was recorded is compared:
    earlier versions recorded less, or nothing. A model stored without its head may be the same.
    """
    if not recorded:
        return []
    keys = [key for key in recorded if same_copy or key not in _OF_ONE_COPY]
    if _MERGED in actual and _MERGED not in recorded:
        keys.append(_MERGED)
    if _HEAD not in actual and not same_copy:
        keys = [key for key in keys if key != _HEAD]
    return [key for key in keys if actual.get(key) != recorded.get(key)]


def described(keys: Iterable[str], recorded: Fingerprint, actual: Fingerprint) -> str:
    """What differs, to be read: "norm_eps: 1e-05, now 1e-06"."""
    return ", ".join(f"{key}: {recorded.get(key)!r}, now {actual.get(key)!r}" for key in keys)


def _sampled(parts: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_bytes(part.detach().cpu().to(torch.bfloat16)))
    return digest.hexdigest()[:_DIGITS]


def _role(name: str) -> str:
    """A tensor's name, the same one in all layers."""
    parts = name.split(".")
    return ".".join(["layers.*", *parts[2:]] if parts[0] == "layers" else parts)


def _plain(value: object) -> str | int | float:
    if isinstance(value, float):
        # As precisely as it is computed with: GGUF files store it so.
        return float(str(np.float32(value)))
    if isinstance(value, str | int):
        return value
    # A part of the config, such as how RoPE is scaled, or None.
    parts = None if value is None else vars(value)
    return json.dumps(parts and {name: _plain(part) for name, part in parts.items()})


def _runs(windows: Iterable[int | None]) -> str:
    """The layers' sliding windows in short: "28 x full, 4 x 4096"."""
    runs = ((len(list(group)), window) for window, group in groupby(windows))
    return ", ".join(f"{count} x {window or 'full'}" for count, window in runs)


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_DIGITS]
