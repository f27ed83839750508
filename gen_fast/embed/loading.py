"""`load` and the one-line `encode`: from a model name to an Encoder."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from gen_fast.embed.adapter import FORMAT, Adapter
from gen_fast.embed.choices import (
    DEFAULT_METHOD,
    DEFAULT_MODEL,
    GEM,
    LLM2VEC,
    LLM2VEC_BARE,
    LLM2VEC_GEN,
    SENTENCE_TRANSFORMERS,
)
from gen_fast.embed.encoder import Embedded, Encoder
from gen_fast.embed.gem import GEMMethod
from gen_fast.embed.llm2vec import LLM2Vec
from gen_fast.embed.methods import (
    TRAINING_FREE,
    HyDE,
    HyDESettings,
    LLM2VecGen,
    Method,
    SentenceTransformers,
)
from gen_fast.errors import AdapterError, ConfigError, UnsupportedModelError
from gen_fast.formats import gem, llm2vec, llm2vec_gen, peft, sentence_transformers
from gen_fast.model.backbone import Backbone
from gen_fast.model.device import resolve_device, resolve_dtype
from gen_fast.model.generation import AnswerGenerator
from gen_fast.model.lora import LoraWeights
from gen_fast.model.model_files import read_json
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import Tokenizer, load_tokenizer
from gen_fast.model.weights import load_backbone, read_fingerprint

logger = logging.getLogger(__name__)

# Adapters that come with the package, by the name of their backbone.
SHIPPED_ADAPTERS = {DEFAULT_MODEL: Path(__file__).parents[1] / "adapters" / DEFAULT_MODEL}


def load(
    model: str | Path = DEFAULT_MODEL,
    *,
    method: str | None = None,
    backbone: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    max_length: int | None = None,
    deterministic: bool = False,
    hyde: HyDESettings | None = None,
    streams: int | None = None,
    graphs: bool | None = None,
) -> Encoder:
    """Load a model and return an Encoder.

    model: "smollm2-135m", a Hub id, a .gguf file, or a directory that holds an adapter of ours, a
    published llm2vec-gen or LLM2Vec checkpoint, a GEM model, a model in sentence-transformers'
    layout or a plain backbone.
    method: None takes the directory's own: "llm2vec-gen" for an adapter, "llm2vec" for a directory
    of LLM2Vec, "gem" for one of GEM, "sentence-transformers" for that layout (its pooling, modules,
    prompts and maximum length). A backbone, also that of such a layout, is embedded by a
    training-free method: "mean" (default), "weighted-mean", "last-token", "echo", "hyde" or,
    without the causal mask that it was trained with, "llm2vec"; "smollm2-135m" by the adapter that
    is shipped for it, unless such a method is given. "llm2vec-bare": all tokens of the bare text,
    as a teacher of llm2vec-gen.
    backbone: where an adapter's backbone lies, if not under the name it records. For an LLM2Vec
    adapter also the directory of the MNTP adapter below it, if no file names that.
    device: None takes CUDA if there is one. dtype: "auto" is bfloat16 where the device computes
    with it natively, else float32; or "float32", "bfloat16", "float16", or a torch.dtype.
    quantize: "int4" keeps the weights of the layers' linears in 4 bits, groups of 32 with a scale
    and a minimum, after adapters of LoRA are merged; what was Q4_1 in a GGUF file keeps its values.
    "int8-weight-only" does the same in 8 bits, in which what was Q8_0 keeps its values.
    "int8" keeps weights, and the rows that they meet, in 8 bits, calibrated on texts of our own
    (docs/quantisation.md). "fp8" keeps both in e4m3, on GPUs of sm_89 and newer. None keeps them in
    dtype, or as a copy that `gen-fast quantize` has made has them.
    revision: of the Hub repository `model`. max_length: tokens, special tokens included.
    deterministic: a text's embedding has the same bits whatever else is in the call (one text a
    batch: slower). hyde: how method "hyde" answers queries; refused with another.
    streams: batches run side by side on a CPU, each by as many of torch's threads as there are for
    it. 1 gives every batch all threads. None measures once which is faster, when enough texts have
    been embedded that it pays; the result is kept in the cache. Embeddings do not depend on it.
    graphs: pad small batches to few shapes and run these as CUDA graphs (docs/performance.md); None
    does so on a GPU. True on a CPU pads them all the same, which shows that it changes nothing.

    Raises ConfigError, ModelNotFoundError, UnsupportedModelError, WeightsError, AdapterError or
    BackboneMismatchError.
    """
    target = resolve_device(device)
    resolved_dtype = resolve_dtype(dtype, target)
    location = _locate(model, method, backbone, revision)
    location = replace(location, method=_answering(location.method, hyde, deterministic))
    network = load_backbone(
        location.source,
        dtype=resolved_dtype,
        device=target,
        packed=True,
        adapters=location.adapters,
        bidirectional=location.bidirectional,
        quantize=quantize,
    )
    if graphs is not None:
        network.use_graphs = graphs
    tokenizer = _load_tokenizer(location)
    kept = network.quantize or resolved_dtype
    logger.info(
        "%s: %s on %s in %s, weights %s", model, location.method.name, target, resolved_dtype, kept
    )
    return Encoder(
        network,
        tokenizer,
        _checked_method(location, network).bound(network, tokenizer, location.source),
        max_length=max_length,
        deterministic=deterministic,
        streams=streams,
        name=str(model),
        source=location.source,
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
    adapter (None without one); for sentence-transformers' layout also the prompt used by default
    and what is done to the states. Raises as `load` does.
    """
    location = _locate(model, method, backbone, revision)
    fingerprint = read_fingerprint(
        location.source, adapters=location.adapters, bidirectional=location.bidirectional
    )
    location.method.check_backbone(fingerprint)
    return location.method.whole_identity(fingerprint, _load_tokenizer(location))


@dataclass(frozen=True)
class _Location:
    """Where a model and its backbone lie, and how its texts are embedded.

    source: the backbone's directory. adapters: what is merged into it. tokenizer: the directory of
    the tokenizer, if that is not the backbone's.
    """

    directory: Path
    source: Path
    method: Method
    adapters: tuple[LoraWeights, ...] = ()
    tokenizer: Path | None = None

    @property
    def bidirectional(self) -> bool:
        return self.method.mask == "bidirectional"


def _locate(
    model: str | Path, method: str | None, backbone: str | Path | None, revision: str | None
) -> _Location:
    shipped = SHIPPED_ADAPTERS.get(str(model)) if method in (None, LLM2VEC_GEN) else None
    directory = shipped or resolve(model, revision)
    adapter = _adapter_in(directory)
    if adapter is not None:
        if method not in (None, LLM2VEC_GEN):
            raise UnsupportedModelError(
                f"{directory} is an llm2vec-gen adapter; for method {method!r} load its backbone"
            )
        source = resolve(backbone or adapter.backbone, adapter.backbone_revision)
        return _Location(directory, source, LLM2VecGen(adapter))
    if gem.is_gem(directory) and method in (None, GEM):
        return _locate_gem(directory, str(model), backbone)
    if method == GEM:
        raise UnsupportedModelError(
            f"{directory} has no {gem.SETTINGS}: method {GEM!r} needs a model trained by it"
        )
    if _is_llm2vec(directory, method):
        return _locate_llm2vec(directory, str(model), method or LLM2VEC, backbone)
    if _is_lora(directory):
        return _locate_lora(directory, str(model), method, backbone)
    if backbone is not None:
        raise AdapterError(f"{directory} holds no adapter, so backbone= has no meaning")
    is_sentence_model = sentence_transformers.is_sentence_model(directory)
    if is_sentence_model and method in (None, SENTENCE_TRANSFORMERS):
        sentence_model = sentence_transformers.read_sentence_model(directory)
        return _Location(
            directory, sentence_model.transformer, SentenceTransformers(sentence_model)
        )
    if method == SENTENCE_TRANSFORMERS:
        raise UnsupportedModelError(
            f"{directory} has no modules.json, so method {method!r} has no meaning"
        )
    name = method or DEFAULT_METHOD
    if name not in TRAINING_FREE:
        known = ", ".join((*TRAINING_FREE, LLM2VEC, LLM2VEC_BARE))
        raise UnsupportedModelError(f"method {method!r} is not one of {known}")
    source = directory
    if is_sentence_model:
        source = sentence_transformers.transformer_directory(directory)
    return _Location(directory, source, TRAINING_FREE[name](name))


def _is_llm2vec(directory: Path, method: str | None) -> bool:
    """Whether a directory is read as LLM2Vec's."""
    if method is None:
        return llm2vec.is_checkpoint(directory)
    return method in (LLM2VEC, LLM2VEC_BARE)


def _is_lora(directory: Path) -> bool:
    # An adapter in sentence-transformers' layout is refused with that layout.
    return peft.is_adapter(directory) and not sentence_transformers.is_sentence_model(directory)


def _locate_lora(
    directory: Path, name: str, method: str | None, backbone: str | Path | None
) -> _Location:
    """A LoRA adapter by a training-free method, with the causal mask that it was trained with."""
    if method is None or method not in TRAINING_FREE:
        known = ", ".join((*TRAINING_FREE, LLM2VEC, LLM2VEC_BARE))
        raise UnsupportedModelError(
            f"{directory} is a LoRA adapter: one of {known} must be given as method, "
            f"{'not ' + repr(method) if method else 'and none was'}"
        )
    if llm2vec.is_checkpoint(directory):
        raise UnsupportedModelError(
            f"{directory} was trained without its causal mask: read it by method {LLM2VEC!r} or "
            f"{LLM2VEC_BARE!r}, not {method!r}"
        )
    checkpoint = llm2vec.read_checkpoint(directory, name, backbone)
    return _Location(
        directory,
        checkpoint.source,
        TRAINING_FREE[method](method),
        checkpoint.adapters,
        checkpoint.tokenizer,
    )


def _locate_llm2vec(
    directory: Path, name: str, method: str, backbone: str | Path | None
) -> _Location:
    if backbone is not None and not peft.is_adapter(directory):
        raise AdapterError(f"{directory} holds no adapter, so backbone= has no meaning")
    if sentence_transformers.is_sentence_model(directory):
        directory = sentence_transformers.transformer_directory(directory)
    checkpoint = llm2vec.read_checkpoint(directory, name, backbone)
    return _Location(
        directory,
        checkpoint.source,
        LLM2Vec(method, checkpoint),
        checkpoint.adapters,
        checkpoint.tokenizer,
    )


def _locate_gem(directory: Path, name: str, backbone: str | Path | None) -> _Location:
    tokens = gem.read_special(directory)
    if backbone is not None and not peft.is_adapter(directory):
        raise AdapterError(f"{directory} is a whole model, so backbone= has no meaning")
    checkpoint = llm2vec.read_checkpoint(directory, name, backbone)
    return _Location(
        directory,
        checkpoint.source,
        GEMMethod(tokens),
        checkpoint.adapters,
        checkpoint.tokenizer,
    )


def _answering(method: Method, hyde: HyDESettings | None, deterministic: bool) -> Method:
    """The method, with what `load` was told of answers to queries."""
    if isinstance(method, HyDE):
        return HyDE(method.name, hyde or HyDESettings(), one_by_one=deterministic)
    if hyde is not None:
        raise ConfigError(f"hyde= has no meaning with method {method.name!r}")
    return method


def _load_tokenizer(location: _Location) -> Tokenizer:
    tokenizer = load_tokenizer(location.tokenizer or location.source)
    location.method.prepare(tokenizer)
    return tokenizer


def _checked_method(location: _Location, backbone: Backbone) -> Method:
    """The method; a checkpoint without a fingerprint is checked by the rows that it stores."""
    method = location.method
    if isinstance(method, LLM2VecGen) and llm2vec_gen.is_checkpoint(location.directory):
        llm2vec_gen.check_embedding(location.directory, backbone.embedding)
        return LLM2VecGen(method.adapter.with_fingerprint(backbone.fingerprint))
    return method


def load_generator(
    model: str | Path = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    graphs: bool | None = None,
    **options: Any,
) -> AnswerGenerator:
    """Load a model to write answers with. `options` are those of AnswerGenerator.

    model: a backbone, or a directory of a LoRA adapter, which is merged into its own; a GEM model
    is one or the other. Without sampling=… it draws as the backbone's generation_config.json says.
    graphs: see `load`.
    Raises UnsupportedModelError for an LLM2Vec model, and as `load` does.
    """
    target = resolve_device(device)
    files = locate_generator(model, revision)
    network = load_backbone(
        files.source,
        dtype=resolve_dtype(dtype, target),
        device=target,
        packed=True,
        adapters=files.adapters,
        quantize=quantize,
    )
    if graphs is not None:
        network.use_graphs = graphs
    return AnswerGenerator(network, files.source, load_tokenizer(files.tokenizer), **options)


def locate_generator(model: str | Path, revision: str | None = None) -> llm2vec.Checkpoint:
    """Where the backbone, the adapters and the tokenizer of a model that generates lie.

    Raises as `load_generator` does.
    """
    directory = resolve(model, revision)
    if llm2vec.is_checkpoint(directory):
        raise UnsupportedModelError(
            f"{directory} was trained without its causal mask: it does not generate"
        )
    return llm2vec.read_checkpoint(directory, str(model))


def _adapter_in(directory: Path) -> Adapter | None:
    """The adapter in `directory`, of ours or of the reference package; None for a backbone."""
    if llm2vec_gen.is_checkpoint(directory):
        return Adapter(**vars(llm2vec_gen.read_checkpoint(directory)))
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
    quantize: str | None = None,
    **encode_options: Any,
) -> Embedded:
    """Embed texts in one line. The model loaded last stays in memory for the next call.

    encode_options are those of `Encoder.encode`: prompt, prompt_name, normalize_embeddings, … .
    """
    options = (
        ("method", method),
        ("device", device),
        ("dtype", dtype),
        ("quantize", quantize),
    )
    encoder: Encoder = _shared_encoder(str(model), options)
    return encoder.encode(texts, **encode_options)
