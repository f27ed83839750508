"""`load` and the one-line `encode`: from a model name to an Encoder."""

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_fast.adapter import DEFAULT_PROMPTS, FORMAT, Adapter
from gen_fast.checkpoints import (
    check_embedding,
    is_reference_checkpoint,
    load_reference_checkpoint,
)
from gen_fast.device import resolve_dtype
from gen_fast.encoder import Encoder
from gen_fast.errors import AdapterError, UnsupportedModelError
from gen_fast.generation import AnswerGenerator
from gen_fast.methods import TRAINING_FREE
from gen_fast.sources import resolve
from gen_fast.tokenizing import load_tokenizer
from gen_fast.weights import load_backbone, read_fingerprint, read_json

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_METHOD = "mean"
# Adapters that come with the package, by the name of their backbone.
SHIPPED_ADAPTERS = {"smollm2-135m": Path(__file__).parent / "adapters" / "smollm2-135m"}


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    method: str | None = None,
    backbone: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    max_length: int | None = None,
    deterministic: bool = False,
) -> Encoder:
    """Load a model and return an Encoder.

    model: "smollm2-135m", a Hub id, a .gguf file, or a directory that holds an adapter of ours, a
    published llm2vec-gen checkpoint or a plain backbone. A plain backbone is embedded by a
    training-free `method`: "mean" (default), "weighted-mean", "last-token", "echo" or "hyde";
    "smollm2-135m" by the adapter that is shipped for it, unless such a method is given.
    backbone: where an adapter's backbone lies, if not under the name it records.
    device: None takes CUDA if there is one. dtype: "auto" is bfloat16 where the device computes
    with it natively, else float32; or "float32", "bfloat16", "float16", or a torch.dtype.
    revision: of the Hub repository `model`. max_length: tokens, special tokens included.
    deterministic: a text's embedding has the same bits whatever else is in the call (one text a
    batch: slower).

    Raises ModelNotFoundError, UnsupportedModelError, WeightsError, AdapterError or
    BackboneMismatchError.
    """
    chosen_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen_dtype = resolve_dtype(dtype, chosen_device)
    directory, source, adapter = _locate(model, method, backbone, revision)
    network = load_backbone(source, dtype=chosen_dtype, device=chosen_device)
    tokenizer = load_tokenizer(source)
    if adapter is not None:
        adapter.check_backbone(network.fingerprint)
        if is_reference_checkpoint(directory):
            check_embedding(directory, network.embedding)
            adapter = adapter.with_fingerprint(network.fingerprint)
    method = "llm2vec-gen" if adapter else method or DEFAULT_METHOD
    network.pack()
    generator = AnswerGenerator(network, source, tokenizer) if method == "hyde" else None
    logger.info("%s: %s on %s in %s", model, method, chosen_device, chosen_dtype)
    return Encoder(
        network,
        tokenizer,
        method,
        adapter=adapter,
        generator=generator,
        max_length=max_length,
        deterministic=deterministic,
        name=str(model),
        source=source,
    )


def identify(
    model: str | Path = DEFAULT_MODEL,
    *,
    method: str | None = None,
    backbone: str | Path | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """What decides the embeddings that `load` with these options would give, from files alone.

    Method, dimension, prompts and fingerprints, as JSON: of the backbone, the tokenizer and the
    adapter (None without one). Raises as `load` does.
    """
    _, source, adapter = _locate(model, method, backbone, revision)
    fingerprint = read_fingerprint(source)
    if adapter is not None:
        adapter.check_backbone(fingerprint)
    tokenizer = load_tokenizer(source).backend.to_str()
    return {
        "method": "llm2vec-gen" if adapter else method or DEFAULT_METHOD,
        "dimension": adapter.dimension if adapter else fingerprint["hidden_size"],
        "prompts": dict(adapter.prompts if adapter else dict.fromkeys(DEFAULT_PROMPTS, "")),
        "backbone": fingerprint,
        "tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest()[:16],
        "adapter": adapter.weights_hash() if adapter else None,
        "max_length": adapter.max_length if adapter else None,
    }


def _locate(
    model: str | Path, method: str | None, backbone: str | Path | None, revision: str | None
) -> tuple[Path, Path, Adapter | None]:
    """The directory of `model`, that of its backbone, and the adapter in the first, if any."""
    shipped = SHIPPED_ADAPTERS.get(str(model)) if method in (None, "llm2vec-gen") else None
    directory = shipped or resolve(model, revision)
    adapter = _adapter_in(directory)
    if adapter is None:
        if backbone is not None:
            raise AdapterError(f"{directory} holds no adapter, so backbone= has no meaning")
        if method is not None and method not in TRAINING_FREE:
            raise UnsupportedModelError(
                f"method {method!r} is not one of {', '.join(TRAINING_FREE)}"
            )
        return directory, directory, None
    if method not in (None, "llm2vec-gen"):
        raise UnsupportedModelError(
            f"{directory} is an llm2vec-gen adapter; for method {method!r} load its backbone"
        )
    source = resolve(backbone or adapter.backbone, adapter.backbone_revision)
    return directory, source, adapter


def load_generator(
    model: str | Path = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    **options: Any,
) -> AnswerGenerator:
    """Load a backbone to write answers with. `options` are those of AnswerGenerator."""
    chosen_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = resolve(model, revision)
    network = load_backbone(source, dtype=resolve_dtype(dtype, chosen_device), device=chosen_device)
    network.pack()
    return AnswerGenerator(network, source, load_tokenizer(source), **options)


def _adapter_in(directory: Path) -> Adapter | None:
    """The adapter in `directory`, of ours or of the reference package; None for a backbone."""
    if is_reference_checkpoint(directory):
        return load_reference_checkpoint(directory)
    config = directory / "config.json"
    if config.is_file() and str(read_json(config).get("format", "")).startswith("gen_fast."):
        return Adapter.load(directory)
    if (directory / "adapter.safetensors").exists():
        raise AdapterError(f"{directory} has adapter.safetensors without a {FORMAT} config.json")
    if (directory / "alignment_mlp").exists() or (directory / "run_config.yml").exists():
        raise AdapterError(f"{directory} is a llm2vec-gen checkpoint without encoder/")
    return None


@lru_cache(maxsize=1)
def _shared_encoder(model: str, options: tuple[tuple[str, Any], ...]) -> Encoder:
    return load(model, **dict(options))


def encode(
    texts: str | Sequence[str],
    model: str | Path = DEFAULT_MODEL,
    *,
    method: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    **encode_options: Any,
) -> np.ndarray | Tensor:
    """Embed texts in one line. The model loaded last stays in memory for the next call.

    encode_options are those of `Encoder.encode`: prompt, prompt_name, normalize_embeddings, … .
    """
    options = (("method", method), ("device", device), ("dtype", dtype))
    encoder: Encoder = _shared_encoder(str(model), options)
    return encoder.encode(texts, **encode_options)
