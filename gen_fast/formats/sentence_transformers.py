"""Model directories in sentence-transformers' layout, read without that package.

`modules.json` lists what is run one after another: a Transformer, perhaps a Dense of every token's
state and WordWeights, a Pooling, then any of Dense and Normalize.
`config_sentence_transformers.json` has the prompts, `sentence_bert_config.json` what is done to a
text. What is not computed here is refused by name.

Source: sentence-transformers 6.2, whose reading of these files, defaults included, is followed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gen_fast.errors import UnsupportedModelError, WeightsError
from gen_fast.formats.sentence_modules import (
    Dense,
    Normalize,
    Pooling,
    read_dense,
    read_normalize,
    read_optional,
    read_pooling,
    read_word_weights,
)
from gen_fast.model.config import BackboneConfig, parse_config
from gen_fast.model.model_files import read_json

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")

_PACKAGES = (
    "sentence_transformers.models",
    "sentence_transformers.base.modules",
    "sentence_transformers.sentence_transformer.modules",
)
_MODULES = ("Transformer", "WordWeights", "Pooling", "Dense", "Normalize")
_FILES = {"WordWeights": "word_weights"}
# Every name under which a release has written a module: by its package or by its file.
_TYPES = {
    name: module
    for module in _MODULES
    for package in _PACKAGES
    for name in (f"{package}.{module}", f"{package}.{_FILES.get(module, module.lower())}.{module}")
}
_TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


@dataclass(frozen=True)
class SentenceModel:
    """Everything that such a directory says besides its backbone.

    transformer: where config.json, tokenizer.json and the weights lie. modules: run on the pooled
    vector in this order. prompts: "query" and "document" are always there. max_length: tokens,
    special tokens included. truncate_dim: dimensions kept unless a call says otherwise.
    """

    transformer: Path
    pooling: Pooling
    modules: tuple[Dense | Normalize, ...]
    hidden_size: int
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    similarity_fn_name: str
    truncate_dim: int | None
    max_length: int
    do_lower_case: bool

    @property
    def full_dimension(self) -> int:
        """Size of an embedding before `truncate_dim`."""
        sizes = [len(m.weight) for m in self.modules if isinstance(m, Dense)]
        return sizes[-1] if sizes else self.hidden_size

    @property
    def dimension(self) -> int:
        """Size of an embedding."""
        return min(self.full_dimension, self.truncate_dim or self.full_dimension)

    def identity(self) -> dict[str, Any]:
        """What decides an embedding besides backbone, tokenizer and prompts, as JSON."""
        return {
            **self.pooling.identity(),
            "modules": [module.identity() for module in self.modules],
            "truncate_dim": self.truncate_dim,
            "do_lower_case": self.do_lower_case,
        }

    def check_prompts(self, special_tokens: Sequence[str]) -> None:
        """Raise UnsupportedModelError if a prompt spells a special token.

        Here special tokens in a text are read as text, so the ids would be others.
        """
        for name, prompt in self.prompts.items():
            for token in special_tokens:
                if token in prompt:
                    raise UnsupportedModelError(
                        f"the prompt {name!r} holds the special token {token!r}, which is read as "
                        "text here"
                    )


def is_sentence_model(directory: Path) -> bool:
    """True if `directory` is in sentence-transformers' layout."""
    return (directory / "modules.json").is_file()


def transformer_directory(directory: Path) -> Path:
    """Where the backbone of a directory in this layout lies: the same directory, or one in it.

    Raises WeightsError for a damaged modules.json, UnsupportedModelError without a Transformer.
    """
    kind, path = _read_modules(directory)[0]
    if _TYPES.get(kind) != "Transformer":
        raise UnsupportedModelError(
            f"{directory}/modules.json begins with {kind!r}, which is not a Transformer"
        )
    return path


def read_sentence_model(directory: str | Path) -> SentenceModel:
    """Read a directory in sentence-transformers' layout, all but the backbone's weights.

    Raises UnsupportedModelError naming what is not computed here, WeightsError for damaged files
    and for weights of a Dense that are missing, misshapen or pickled.
    """
    directory = Path(directory)
    transformer = transformer_directory(directory)
    if (transformer / "adapter_config.json").is_file():
        raise UnsupportedModelError(f"{transformer} holds a PEFT adapter: merge it first")
    config = parse_config(read_json(transformer / "config.json"))
    text = read_optional(transformer / "sentence_bert_config.json")
    _check_text_settings(text)
    settings = read_optional(directory / "config_sentence_transformers.json")
    prompts, default_prompt_name = _read_prompts(settings)
    pooling, modules = _read_pooling_and_modules(directory, config)
    truncate_dim = settings.get("truncate_dim")
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise UnsupportedModelError(
            f"similarity_fn_name {similarity!r} is not one of {', '.join(SIMILARITIES)}"
        )
    return SentenceModel(
        transformer=transformer,
        pooling=pooling,
        modules=modules,
        hidden_size=config.hidden_size,
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        similarity_fn_name=similarity,
        truncate_dim=None if truncate_dim is None else int(truncate_dim),
        max_length=_max_length(text, transformer, config),
        do_lower_case=bool(text.get("do_lower_case")),
    )


def _read_modules(directory: Path) -> list[tuple[str, Path]]:
    """Type and directory of each module, in their order."""
    path = directory / "modules.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        modules = [(str(entry["type"]), str(entry["path"])) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} is not a list of modules: {error!r}") from error
    if not modules:
        raise WeightsError(f"{path} lists no module")
    for _, folder in modules:
        pure = PurePosixPath(folder.replace("\\", "/"))
        if pure.is_absolute() or ".." in pure.parts:
            raise WeightsError(f"{path}: the path {folder!r} leads out of the directory")
    return [(kind, directory / folder) for kind, folder in modules]


def _read_pooling_and_modules(
    directory: Path, config: BackboneConfig
) -> tuple[Pooling, tuple[Dense | Normalize, ...]]:
    """What follows the Transformer."""
    counted = pooling = None
    size = config.hidden_size
    before: list[Dense] = []
    modules: list[Dense | Normalize] = []
    for kind, path in _read_modules(directory)[1:]:
        module = _TYPES.get(kind)
        if module == "WordWeights" and counted is None and pooling is None:
            counted = read_word_weights(path, config.vocab_size)
        elif module == "Dense" and not before and pooling is None:
            before.append(read_dense(path, size, of="token_embeddings"))
            size = len(before[0].weight)
        elif module == "Pooling" and pooling is None:
            pooling = read_pooling(path, size, counted)
            _check_order_is_free(before, pooling, path)
        elif module == "Dense" and pooling is not None:
            dense = read_dense(path, size)
            modules.append(dense)
            size = len(dense.weight)
        elif module == "Normalize" and pooling is not None:
            modules.append(read_normalize(path))
        else:
            raise UnsupportedModelError(
                f"{directory}/modules.json: a module of type {kind!r} is not supported at this "
                "place; supported are Transformer, a Dense of token embeddings, WordWeights, "
                "Pooling, then Dense and Normalize"
            )
    if pooling is None:
        raise UnsupportedModelError(f"{directory}/modules.json lists no Pooling")
    return pooling, (*before, *modules)


def _check_order_is_free(dense: Sequence[Dense], pooling: Pooling, path: Path) -> None:
    """Raise UnsupportedModelError if a Dense of every token's state is not one of the pooled state.

    A linear map of a weighted mean, also of a single state, is the weighted mean of the maps.
    """
    is_mean = pooling.mode in ("mean", "weightedmean", "lasttoken", "cls")
    if dense and not (is_mean and dense[0].activation == "Identity"):
        raise UnsupportedModelError(
            f"{path}: behind a Dense of token embeddings only a mean or one token is supported, "
            "and no activation"
        )


def _check_text_settings(text: Mapping[str, Any]) -> None:
    """Refuse what a Transformer would do to texts or with states and is not done here."""
    same_numbers = ("max_seq_length", "do_lower_case", "unpad_inputs")
    defaults = {
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
        "modality_config": _TEXT_ONLY,
    }
    for key, value in text.items():
        # Anything else counts only if it asks for something.
        if key in same_numbers or not value or value == defaults.get(key):
            continue
        if key == "modality_config" and "message" in value:
            raise UnsupportedModelError(
                "sentence_bert_config.json: modality_config has 'message', which puts every text "
                "into the chat template; this is not supported"
            )
        raise UnsupportedModelError(f"sentence_bert_config.json: {key} {value!r} is not supported")


def _read_prompts(settings: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    kind = settings.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise UnsupportedModelError(
            f"config_sentence_transformers.json: model_type {kind!r} is not supported"
        )
    prompts = {"query": "", "document": ""}
    for name, prompt in (settings.get("prompts") or {}).items():
        if not isinstance(prompt, str | None):
            raise WeightsError(f"config_sentence_transformers.json: prompt {name!r} is no text")
        prompts[name] = prompt or ""
    default = settings.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise UnsupportedModelError(
            f"default_prompt_name {default!r} is not one of the prompts {', '.join(prompts)}"
        )
    return prompts, default


def _max_length(text: Mapping[str, Any], transformer: Path, config: BackboneConfig) -> int:
    tokenizer = read_optional(transformer / "tokenizer_config.json")
    side = tokenizer.get("truncation_side", "right")
    if side != "right":
        raise UnsupportedModelError(
            f"tokenizer_config.json: truncation_side {side!r} is not supported, a long text loses "
            "its tail here"
        )
    length = text.get("max_seq_length")
    if length is None:
        limits = tokenizer.get("model_max_length"), config.max_positions
        length = min(limit for limit in limits if limit is not None)
    if not 1 <= length <= config.max_positions:
        raise UnsupportedModelError(
            f"max_seq_length {length} is outside 1…{config.max_positions}, the positions that the "
            "model was made for"
        )
    return int(length)
