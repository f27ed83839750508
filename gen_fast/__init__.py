"""Fast generative embeddings.

`load` gives an Encoder, `encode` embeds in one line. Importing this package loads neither
transformers nor Triton and does not initialise CUDA.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gen_fast.version import __version__

if TYPE_CHECKING:
    from gen_fast.embed.adapter import Adapter
    from gen_fast.embed.encoder import Encoder
    from gen_fast.embed.loading import encode, load
    from gen_fast.embed.methods import HyDESettings
    from gen_fast.embed.quantizing import write_quantized
    from gen_fast.embed.reading import Reader
    from gen_fast.errors import (
        AdapterError,
        BackboneMismatchError,
        CacheError,
        CheckpointError,
        ConfigError,
        CorpusError,
        DeviceMemoryError,
        GenFastError,
        ImplementationError,
        InputError,
        JobError,
        ModelNotFoundError,
        NonFiniteError,
        NonFiniteLossError,
        OpError,
        PrefixCacheError,
        PromptError,
        TextError,
        TextTypeError,
        UnsupportedModelError,
        WeightsError,
    )
    from gen_fast.jobs.job import embed_columns, embed_corpus
    from gen_fast.jobs.settings import Settings
    from gen_fast.search.build import build_index
    from gen_fast.search.corpus import open_index

# Where each public name lives; resolved on first use, so that importing stays cheap.
_HOME = {
    "Adapter": "embed.adapter",
    "Encoder": "embed.encoder",
    "HyDESettings": "embed.methods",
    "Reader": "embed.reading",
    "Settings": "jobs.settings",
    "embed_columns": "jobs.job",
    "embed_corpus": "jobs.job",
    "encode": "embed.loading",
    "build_index": "search.build",
    "open_index": "search.corpus",
    "load": "embed.loading",
    "write_quantized": "embed.quantizing",
    "AdapterError": "errors",
    "BackboneMismatchError": "errors",
    "CacheError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "CorpusError": "errors",
    "DeviceMemoryError": "errors",
    "GenFastError": "errors",
    "ImplementationError": "errors",
    "InputError": "errors",
    "JobError": "errors",
    "ModelNotFoundError": "errors",
    "NonFiniteError": "errors",
    "NonFiniteLossError": "errors",
    "OpError": "errors",
    "PrefixCacheError": "errors",
    "PromptError": "errors",
    "TextError": "errors",
    "TextTypeError": "errors",
    "UnsupportedModelError": "errors",
    "WeightsError": "errors",
}

__all__ = [  # noqa: RUF022 - what people look for first stands first
    "load",
    "encode",
    "write_quantized",
    "embed_corpus",
    "embed_columns",
    "Settings",
    "build_index",
    "open_index",
    "Encoder",
    "Adapter",
    "Reader",
    "HyDESettings",
    "__version__",
    "GenFastError",
    "TextError",
    "TextTypeError",
    "InputError",
    "PromptError",
    "NonFiniteError",
    "ModelNotFoundError",
    "UnsupportedModelError",
    "CacheError",
    "WeightsError",
    "DeviceMemoryError",
    "AdapterError",
    "BackboneMismatchError",
    "PrefixCacheError",
    "JobError",
    "CorpusError",
    "ConfigError",
    "CheckpointError",
    "NonFiniteLossError",
    "OpError",
    "ImplementationError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gen_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gen_fast.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
