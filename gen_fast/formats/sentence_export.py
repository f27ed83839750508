"""Model directories in sentence-transformers' layout, written for that package to run as it is.

Transformer (backbone and tokenizer), Dense of every token's state, WordWeights where not every
token is pooled, Pooling. No code of gen_fast is needed to read them. Source: sentence-transformers
6.2, which also reads the shorter names of its older releases, written here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as RustTokenizer
from torch import Tensor

from gen_fast.errors import UnsupportedModelError
from gen_fast.formats.causal_lm import config_of
from gen_fast.formats.sentence_modules import POOLING_FLAGS, Pooling
from gen_fast.io.durable import as_readable_as_others, check_is_new, new_directory
from gen_fast.model.model_files import read_json
from gen_fast.model.shards import save_shards
from gen_fast.model.tensor_files import find_tensors
from gen_fast.model.tokenizing import (
    NAMED_TOKENS,
    special_tokens,
    special_tokens_around,
    token_names,
)

# Read by the written tokenizer and by its source, besides every special token.
_PROBE = "A café,  12 cats;\n日本語"


@dataclass(frozen=True)
class SentenceModules:
    """A way to embed, in modules of sentence-transformers.

    appended: new tokens put after every text, in this order, and their embeddings [h].
    word_weights: of tokens by name, 0 or 1, in the mean over a text; default_weight: of all others.
    Without any there is no WordWeights. projection: (weight [d, h], bias [d]) of a Dense.
    """

    pooling: Pooling
    appended: Mapping[str, Tensor] = field(default_factory=dict)
    word_weights: Mapping[str, float] = field(default_factory=dict)
    default_weight: float = 1.0
    projection: tuple[Tensor, Tensor] | None = None


def write_sentence_model(
    directory: Path,
    modules: SentenceModules,
    *,
    source: Path,
    tokenizer: RustTokenizer,
    settings: Mapping[str, Any],
    max_length: int,
    dtype: torch.dtype | None,
    card: str,
) -> None:
    """Write a directory that sentence-transformers runs without code of its own.

    source: the backbone's directory. tokenizer: the backbone's, as texts are read by it. settings:
    prompts, default_prompt_name and similarity_fn_name. max_length: tokens of a text with all that
    is around it. dtype: of the weights; None keeps that of the files. card: content of README.md.

    Raises ConfigError if the directory is not empty, WeightsError for damaged weights,
    UnsupportedModelError if transformers would read texts otherwise.
    """
    check_is_new(directory)
    exported = _with_appended(tokenizer, tuple(modules.appended))
    with new_directory(directory.resolve()) as folder:
        config = _write_backbone(folder, source, modules.appended, exported, dtype)
        _write_tokenizer(folder, source, exported, max_length)
        _check_is_read_alike(folder, exported)
        text = {"max_seq_length": max_length, "do_lower_case": False}
        if modules.word_weights:
            # Without padding, as with flash attention, Pooling would not look at the weights.
            text["unpad_inputs"] = False
        _write_json(folder / "sentence_bert_config.json", text)
        own = {"model_type": "SentenceTransformer", **settings}
        _write_json(folder / "config_sentence_transformers.json", own)
        _write_modules(folder, modules, exported, config)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _with_appended(tokenizer: RustTokenizer, tokens: tuple[str, ...]) -> RustTokenizer:
    """A copy of a tokenizer, to which `tokens` are new and which puts them after every text."""
    exported = RustTokenizer.from_str(tokenizer.to_str())
    exported.encode_special_tokens = True
    if not tokens:
        return exported
    known = [token for token in tokens if exported.token_to_id(token) is not None]
    if known:
        raise UnsupportedModelError(f"the tokenizer already has a token {known[0]!r}")
    exported.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    vocabulary = exported.get_vocab()
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UnsupportedModelError("the vocabulary has gaps, into which new tokens would fall")
    before, after = (token_names(exported, ids) for ids in special_tokens_around(tokenizer))
    around = {*before, *after, *tokens}
    exported.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after, *tokens],
        special_tokens=[(token, vocabulary[token]) for token in sorted(around)],
    )
    return exported


def _write_backbone(
    directory: Path,
    source: Path,
    appended: Mapping[str, Tensor],
    tokenizer: RustTokenizer,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Write config.json, which is returned, and the weights without a head."""
    files = find_tensors(source)
    if files.recipe is not None:
        raise UnsupportedModelError(
            f"{source} is quantised, which sentence-transformers does not read: export "
            f"{files.recipe.source!r}"
        )
    vocabulary = tokenizer.get_vocab()
    new = {vocabulary[token]: embedding for token, embedding in appended.items()}

    def read(name: str) -> Tensor:
        tensor = files.stored(name)
        tensor = tensor.to(dtype or tensor.dtype)
        return _with_rows(tensor, new) if new and name == "embed_tokens.weight" else tensor

    table = read("embed_tokens.weight")
    sizes = {"embed_tokens.weight": table.nbytes}
    for name in files.backbone_names():
        tensor = files.stored(name)  # mapped, not read
        sizes.setdefault(name, tensor.numel() * (dtype or tensor.dtype).itemsize)
    save_shards(directory, sizes, read)
    config = {**config_of(source, "Model", table.dtype), "vocab_size": len(table)}
    _write_json(directory / "config.json", config)
    return config


def _with_rows(table: Tensor, embeddings: Mapping[int, Tensor]) -> Tensor:
    """A copy of an embedding table [V, h] with rows at new ids: spare ones, or behind the last."""
    rows = max(len(table), max(embeddings) + 1)
    longer = table.new_zeros(rows, table.shape[1])
    longer[: len(table)] = table
    for i, embedding in embeddings.items():
        longer[i] = embedding
    return longer


def _write_tokenizer(
    directory: Path, source: Path, tokenizer: RustTokenizer, max_length: int
) -> None:
    tokenizer.save(str(directory / "tokenizer.json"))
    path = source / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    named = {}
    for name in NAMED_TOKENS:
        token = settings.get(name)
        content = token["content"] if isinstance(token, dict) else token
        if content is not None and tokenizer.token_to_id(content) is not None:
            named[name] = content
    # Padding is masked, so that any token will do; but without one no batch is padded.
    named.setdefault("pad_token", named.get("eos_token") or tokenizer.id_to_token(0))
    added = tokenizer.get_added_tokens_decoder().items()
    _write_json(
        directory / "tokenizer_config.json",
        {
            **named,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {str(i): _attributes(token) for i, token in sorted(added)},
            "model_max_length": max_length,
            # On the right, where the positions of a text are those that it has alone.
            "padding_side": "right",
            "truncation_side": "right",
            "clean_up_tokenization_spaces": False,
            # A special token in a text is read as text.
            "split_special_tokens": True,
        },
    )


def _attributes(token: AddedToken) -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _check_is_read_alike(directory: Path, tokenizer: RustTokenizer) -> None:
    """Raise UnsupportedModelError if transformers reads texts otherwise than `tokenizer`.

    For some families it builds another one around the vocabulary of tokenizer.json.
    """
    from transformers import AutoTokenizer

    written = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    for text in ("", _PROBE, *special_tokens(tokenizer)):
        if written(text, verbose=False)["input_ids"] != tokenizer.encode(text).ids:
            raise UnsupportedModelError(
                f"transformers' {type(written).__name__} would read {text!r} as other tokens than "
                "this model does"
            )


def _write_modules(
    directory: Path,
    modules: SentenceModules,
    tokenizer: RustTokenizer,
    config: Mapping[str, Any],
) -> None:
    """Write modules.json and a folder for each module. config: the backbone's."""
    written, size = [], config["hidden_size"]
    if modules.projection is not None:
        # Before the mean, with which a linear map may change places: WordWeights gives float32,
        # which a Dense in half precision behind it would not take.
        written.append(_dense(*modules.projection))
        size = len(modules.projection[0])
    if modules.word_weights:
        written.append(_word_weights(modules, tokenizer, config["vocab_size"]))
    written.append(_pooling(modules.pooling, size))
    entries = [_entry(0, "Transformer", "")]
    for i, (name, values, tensors) in enumerate(written, 1):
        folder = directory / f"{i}_{name}"
        folder.mkdir()
        _write_json(folder / "config.json", values)
        if tensors:
            path = folder / "model.safetensors"
            with as_readable_as_others(path):
                save_file(tensors, path)
        entries.append(_entry(i, name, folder.name))
    _write_json(directory / "modules.json", entries)


def _entry(i: int, name: str, folder: str) -> dict[str, Any]:
    return {
        "idx": i,
        "name": str(i),
        "path": folder,
        "type": f"sentence_transformers.models.{name}",
    }


# Name, configuration and tensors of a module.
_Module = tuple[str, dict[str, Any], dict[str, Tensor]]


def _word_weights(modules: SentenceModules, tokenizer: RustTokenizer, rows: int) -> _Module:
    # Every row of the embedding table needs a word, also one that no token has.
    words = [tokenizer.id_to_token(i) or f"<unused {i}>" for i in range(rows)]
    weights = [modules.word_weights.get(word, modules.default_weight) for word in words]
    values = {
        "vocab": words,
        "word_weights": dict(modules.word_weights),
        "unknown_word_weight": modules.default_weight,
    }
    return "WordWeights", values, {"emb_layer.weight": torch.tensor(weights)[:, None]}


def _pooling(pooling: Pooling, size: int) -> _Module:
    values = {
        "word_embedding_dimension": size,
        **{flag: mode == pooling.mode for flag, mode in POOLING_FLAGS.items()},
        "include_prompt": pooling.include_prompt,
    }
    return "Pooling", values, {}


def _dense(weight: Tensor, bias: Tensor) -> _Module:
    values = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
        "module_input_name": "token_embeddings",
        "module_output_name": "token_embeddings",
    }
    return "Dense", values, {"linear.weight": weight.contiguous(), "linear.bias": bias}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
