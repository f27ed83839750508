"""A cache of instruction keys and values, bounded by bytes."""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gen_fast.errors import PrefixCacheError
from gen_fast.model.backbone import Backbone, PrefixKV

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 1 << 30


class PrefixCache:
    """Keys and values of the prefixes seen last, for one backbone.

    A prefix larger than `max_bytes` is computed for its call and not kept (logged once a call).
    """

    def __init__(self, backbone: Backbone, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.backbone = backbone
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[int, ...], PrefixKV] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(entry.nbytes for entry in self._entries.values())

    def get(self, ids: tuple[int, ...]) -> PrefixKV | None:
        """Return the keys and values of prefix `ids`, computing them if needed; None if empty."""
        if not ids:
            return None
        if ids in self._entries:
            self._entries.move_to_end(ids)
            return self._entries[ids]
        with torch.inference_mode():
            prefix = self.backbone.prefill(ids)
        self._add(prefix)
        return prefix

    def _add(self, prefix: PrefixKV) -> None:
        if prefix.nbytes > self.max_bytes:
            logger.warning(
                "a prefix of %d tokens takes %d bytes, over the cache's limit of %d: not kept",
                len(prefix),
                prefix.nbytes,
                self.max_bytes,
            )
            return
        self._entries[prefix.ids] = prefix
        while self.nbytes > self.max_bytes:
            self._entries.popitem(last=False)

    def save(self, path: str | Path) -> None:
        """Write every entry to one safetensors file, keyed by backbone, dtype and prefix."""
        tensors = {}
        entries = []
        for ids, prefix in self._entries.items():
            key = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
            entries.append({"key": key, "ids": ids})
            for name, index in (("k", 0), ("v", 1)):
                stacked = torch.stack([pair[index] for pair in prefix.layers])
                tensors[f"{key}.{name}"] = stacked.cpu()  # [L, P, KV, D]
        metadata = {
            **self._expected(),
            "entries": json.dumps(entries),
            "sha256": _checksum(json.dumps(entries), tensors),
        }
        temporary = Path(f"{path}.tmp")
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)

    def load(self, path: str | Path) -> int:
        """Add the entries of a saved cache; return how many. Raises PrefixCacheError."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
            for key, value in self._expected().items():
                if metadata.get(key) != value:
                    raise PrefixCacheError(
                        f"prefix cache {path} was written for {key} {metadata.get(key)}, this "
                        f"backbone has {value}"
                    )
            if metadata["sha256"] != _checksum(metadata["entries"], tensors):
                raise PrefixCacheError(f"{path} is damaged: it does not have its sha256")
            entries = json.loads(metadata["entries"])
            for entry in entries:
                k, v = (
                    tensors[f"{entry['key']}.{name}"].to(self.backbone.device)
                    for name in ("k", "v")
                )
                pairs = tuple(zip(k.unbind(), v.unbind(), strict=True))
                self._add(PrefixKV(tuple(entry["ids"]), pairs))
        except (SafetensorError, KeyError, OSError) as error:
            raise PrefixCacheError(f"{path} is not a readable prefix cache: {error}") from error
        return len(entries)

    def _expected(self) -> dict[str, str]:
        """What the file of a cache for this backbone says of it."""
        return {
            "format": "gen_fast.prefix/2",
            "backbone": json.dumps(self.backbone.fingerprint, sort_keys=True),
            "dtype": str(self.backbone.dtype),
            **({"quantize": quantize} if (quantize := self.backbone.quantize) else {}),
        }


def _checksum(entries: str, tensors: Mapping[str, Tensor]) -> str:
    """Of everything that a file of a cache holds."""
    digest = hashlib.sha256(entries.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
