"""Text to token ids: checked, truncated, and split into shared prompt tokens and own tokens."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import normalizers, processors

from gen_fast.errors import (
    ModelNotFoundError,
    PromptError,
    UnsupportedModelError,
    WeightsError,
)
from gen_fast.io.cache import remembered_sha256
from gen_fast.io.checksums import problem
from gen_fast.io.regular_files import check_regular
from gen_fast.model.model_files import read_json
from gen_fast.model.truncation import QWEN2_PIECES, LeadingTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Tokenizer classes of transformers that run tokenizer.json as it is.
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast")
NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """The tokenizer of a model directory, as its `tokenizer.json` and settings describe it.

    core: the Rust tokenizer; from here on it reads special tokens in a text as text.
    eos_token: the end of a text, if the tokenizer has one.
    cleans_up: decoding takes spaces before punctuation away.
    """

    def __init__(
        self,
        directory: Path,
        core: RustTokenizer,
        eos_token: str | None,
        *,
        cleans_up: bool = False,
    ) -> None:
        self._directory = directory
        self._cleans_up = cleans_up
        self.core = core
        self.core.encode_special_tokens = True
        self.core.no_padding()
        self.core.no_truncation()
        self.eos_token = eos_token

    @cached_property
    def backend(self) -> RustTokenizer:
        """A copy of `core` that recognises special tokens in a text."""
        return RustTokenizer.from_str(self.core.to_str())

    @cached_property
    def leading(self) -> LeadingTokens:
        """The first tokens of texts, by `core`."""
        return LeadingTokens(self.core)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end of a text."""
        return None if self.eos_token is None else self.core.token_to_id(self.eos_token)

    @cached_property
    def transformers(self) -> "PreTrainedTokenizerBase":
        """The same as a tokenizer of transformers, whose import takes seconds: chat templates."""
        return _auto_tokenizer(self._directory)

    def ids(self, text: str, *, add_special_tokens: bool) -> np.ndarray:
        """Ids [n] int64 of a text whose special tokens are meant, such as a filled template."""
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return np.array(encoding.ids, dtype=np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, without special tokens."""
        numbers = [int(i) for i in ids]
        if self._cleans_up:
            return str(self.transformers.decode(numbers, skip_special_tokens=True))
        return str(self.backend.decode(numbers, skip_special_tokens=True))

    def added_token_id(self, token: str) -> int | None:
        """Id of a token that stands beside the vocabulary, such as a special one."""
        for number, added in self.core.get_added_tokens_decoder().items():
            if added.content == token:
                return int(number)
        return None


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load the fast tokenizer of a model directory. Never runs code from it.

    `tokenizer.json` is read directly where transformers' AutoTokenizer would give the same ids for
    every text; elsewhere AutoTokenizer is asked. Raises ModelNotFoundError, WeightsError for a
    damaged file, UnsupportedModelError.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(
            f"{directory} has no tokenizer.json; a fast (Rust) tokenizer is needed"
        )
    settings_path = directory / "tokenizer_config.json"
    listed = [file.name for file in (path, settings_path) if file.is_file()]
    if wrong := problem(directory, *listed, sha256=remembered_sha256):
        raise WeightsError(wrong)
    content = read_json(path)  # a damaged file is named
    _check_content(content, path)
    settings = _read_settings(settings_path)
    _refuse_own_code(settings, directory)
    config_path = directory / "config.json"
    family = str(read_json(config_path).get("model_type")) if config_path.is_file() else ""
    if _is_run_as_it_is(content, settings, family, directory):
        try:
            core = RustTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise WeightsError(f"{path} is not a tokenizer: {error}") from error
        eos = settings.get("eos_token")
        eos_token = eos["content"] if isinstance(eos, dict) else eos
    else:
        auto = _auto_tokenizer(directory)
        core, eos_token = auto.backend_tokenizer, auto.eos_token
    _append_declared_eos(core, settings)
    cleans_up = bool(settings.get("clean_up_tokenization_spaces"))
    return Tokenizer(directory, core, eos_token, cleans_up=cleans_up)


def _check_content(content: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError for what is JSON and no tokenizer."""
    added = content.get("added_tokens", [])
    named = isinstance(added, list) and all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and isinstance(token.get("special"), bool)
        and isinstance(token.get("id"), int)
        for token in added
    )
    if not named or not isinstance(content.get("model"), dict):
        raise WeightsError(f"{path} is not a tokenizer: its model or added_tokens are none")


def _read_settings(path: Path) -> dict[str, Any]:
    """What a tokenizer_config.json says; nothing without one. Raises WeightsError."""
    if not os.path.lexists(path):  # a link that leads nowhere is a file that is damaged
        return {}
    try:
        check_regular(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    settings = read_json(path)
    _check_settings(settings, path)
    return settings


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Raise WeightsError naming the key of a tokenizer_config.json that holds something else."""

    def is_token(value: object) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return isinstance(content, str)

    def are_tokens(value: object) -> bool:
        tokens = list(value.values()) if isinstance(value, dict) else value
        return isinstance(tokens, list) and all(map(is_token, tokens))

    kinds: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(NAMED_TOKENS, is_token),
        "additional_special_tokens": are_tokens,
        "extra_special_tokens": are_tokens,
        "added_tokens_decoder": lambda value: (
            isinstance(value, dict)
            and all(isinstance(token, dict) and is_token(token) for token in value.values())
        ),
        "auto_map": lambda value: isinstance(value, dict | list),
        "tokenizer_class": lambda value: isinstance(value, str),
    }
    for key, is_right in kinds.items():
        value = settings.get(key)
        if value is not None and not is_right(value):
            raise WeightsError(f"{path}: {key} cannot be {value!r:.60}")


def _auto_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more specific
        raise WeightsError(
            f"{directory}: transformers cannot make its tokenizer: {type(error).__name__}: {error}"
        ) from error


def _is_run_as_it_is(
    content: Mapping[str, Any], settings: Mapping[str, Any], family: str, directory: Path
) -> bool:
    """Whether transformers runs `tokenizer.json` unchanged for this class, family and settings.

    Source: transformers 5.23, AutoTokenizer.from_pretrained and TokenizersBackend.__init__. Its
    classes of other names rebuild normalizer and pre-tokenizer around the file's vocabulary.
    """
    if "added_tokens_decoder" not in settings and any(
        (directory / name).exists() for name in ("special_tokens_map.json", "added_tokens.json")
    ):
        return False  # older files, of which transformers then takes tokens too
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    generic = name in [known.removesuffix("Fast") for known in _GENERIC_CLASSES]
    if family == "qwen2" or name == "Qwen2Tokenizer":  # qwen2 gets this class whatever it names
        same = _is_built_as_qwen2(content, settings)
    elif family == "mistral":  # the class that is named is passed over
        large = len(content.get("model", {}).get("vocab", ())) > 100_000  # its pieces are mended
        same = not large and not (directory / "tekken.json").exists()
    else:
        byte_level = '"ByteLevel"' in json.dumps(content.get("pre_tokenizer"))
        same = generic or (name == "LlamaTokenizer" and byte_level)
    return same and not _adds_tokens(content, settings)


def _is_built_as_qwen2(content: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether transformers' Qwen2Tokenizer builds the same around the file's vocabulary."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PIECES}, "behavior": "Isolated"}
    pieces = content.get("pre_tokenizer") or {}
    steps = pieces.get("pretokenizers") or []
    model = content.get("model") or {}
    # Of the file's added tokens it has those that the settings list, if they list any.
    lists = "added_tokens_decoder" in settings
    named = {token["content"] for token in _tokens_of(settings)}
    added = {t["content"] for t in content.get("added_tokens", ()) if lists or not t["special"]}
    return (
        added <= named
        and not settings.get("add_prefix_space")
        and "eos_token" in settings
        and (content.get("normalizer") or {}).get("type") == "NFC"
        and len(steps) == 2
        and all(steps[0].get(key) == value for key, value in {**split, "invert": False}.items())
        and all(steps[1].get(key) == value for key, value in byte_level.items())
        and model.get("type") == "BPE"
        and not any(model.get(key) for key in ("byte_fallback", "ignore_merges", "fuse_unk"))
    )


def _adds_tokens(content: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the settings name tokens that the file does not have, or has otherwise."""
    in_file = {token["content"]: token for token in content.get("added_tokens", ())}
    for token in _tokens_of(settings):
        known = in_file.get(token["content"])
        if known is None or any(known.get(key, value) != value for key, value in token.items()):
            return True
    return False


def _tokens_of(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every token of a tokenizer_config.json, with the attributes that it gives."""
    named = [settings.get(name) for name in NAMED_TOKENS]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name) or ()
        named += more.values() if isinstance(more, dict) else more
    for token in filter(None, named):
        # Where a token is only named, the file's own attributes count, but it is special.
        content = token["content"] if isinstance(token, dict) else str(token)
        yield {"content": content, "special": True}
    for token in (settings.get("added_tokens_decoder") or {}).values():
        yield {key: value for key, value in token.items() if not key.startswith("__")}


def special_tokens(backend: RustTokenizer) -> list[str]:
    """The special tokens of a tokenizer, as they are spelled in a text."""
    added = backend.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special]


def token_names(backend: RustTokenizer, ids: np.ndarray) -> list[str]:
    """The tokens of ids, as the vocabulary has them."""
    return [str(backend.id_to_token(int(i))) for i in ids]


def lower_case(backend: RustTokenizer) -> None:
    """Make a tokenizer read every text in lower case, before what else it does to it."""
    own = backend.normalizer
    if '"Lowercase"' not in json.dumps(json.loads(backend.to_str())["normalizer"]):
        steps = [normalizers.Lowercase(), *([] if own is None else [own])]
        backend.normalizer = normalizers.Sequence(steps)


def _refuse_own_code(settings: Mapping[str, Any], directory: Path) -> None:
    code = settings.get("auto_map") or {}
    if isinstance(code, list) or "AutoTokenizer" in code:
        raise UnsupportedModelError(
            f"{directory}/tokenizer_config.json: auto_map names code of the tokenizer's own; it is "
            "never run, and without it the tokens would be others"
        )


def _append_declared_eos(backend: RustTokenizer, settings: Mapping[str, Any]) -> None:
    """Put the end token behind every text where only tokenizer_config.json asks for it.

    e5-mistral-7b-instruct is published so, and its embedding is the state of that token. Its class,
    LlamaTokenizer, did this in transformers 4; transformers 5 takes tokenizer.json as it is.
    """
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if name != "LlamaTokenizer" or not settings.get("add_eos_token"):
        return
    bos, eos = (
        token["content"] if isinstance(token, dict) else str(token)
        for token in (settings.get("bos_token", "<s>"), settings.get("eos_token", "</s>"))
    )
    eos_id = backend.token_to_id(eos)
    if eos_id is None or backend.encode("a").ids[-1] == eos_id:
        return
    has_bos = settings.get("add_bos_token", True) and backend.token_to_id(bos) is not None
    before = [bos] if has_bos else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", eos],
        special_tokens=[(token, backend.token_to_id(token)) for token in (*before, eos)],
    )
    logger.warning(
        "tokenizer.json puts no %s behind a text, tokenizer_config.json asks for it: it is put "
        "there, as by transformers 4",
        eos,
    )


class TextTokenizer:
    """Tokenises prompt + text, special tokens in them read as text, at most max_tokens ids each.

    Truncation is Hugging Face's: prompt and text lose their tail, then the tokenizer's own special
    tokens are put around them, so that a text that was cut keeps its end token.

    prompt_ids: the ids of the prompt alone, behind the tokenizer's leading special tokens.
    The prompt is tokenised together with the text; `shared` counts the leading ids that are those
    of the prompt alone, so that they may come from the prefix cache. One thread at a time.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        max_tokens: int,
        *,
        add_special_tokens: bool = True,
    ) -> None:
        self._leading = tokenizer.leading
        self.prompt = prompt
        self.truncated = 0
        self._before = self._after = np.empty(0, dtype=np.int32)
        if add_special_tokens:
            self._before, self._after = special_tokens_around(tokenizer.core)
        self._room = max_tokens - len(self._before) - len(self._after)
        own = np.array(tokenizer.core.encode(prompt, add_special_tokens=False).ids, dtype=np.int32)
        self.prompt_ids = np.concatenate((self._before, own))
        if len(own) >= self._room:
            raise PromptError(
                f"the prompt takes {len(self.prompt_ids) + len(self._after)} tokens and leaves no "
                f"room for text: {max_tokens} are allowed (raise max_length)"
            )

    def __call__(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the ids of prompt + text, truncated to max_tokens, and their `shared` counts."""
        joined = [self.prompt + text for text in texts] if self.prompt else list(texts)
        rows, truncated = self._leading(joined, self._room)
        self.truncated += truncated
        if len(self._before) or len(self._after):
            rows = [np.concatenate((self._before, row, self._after)) for row in rows]
        return rows, np.array([self._shared(row) for row in rows], dtype=np.int64)

    def _shared(self, ids: np.ndarray) -> int:
        n = min(len(ids), len(self.prompt_ids))
        differs = np.flatnonzero(ids[:n] != self.prompt_ids[:n])
        return int(differs[0]) if len(differs) else n


def special_tokens_around(core: RustTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32, of the special tokens that the post-processor puts before and after a text."""
    encoding = core.encode("a")
    ids = np.array(encoding.ids, dtype=np.int32)
    own = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
    return ids[: own[0]], ids[own[-1] + 1 :]
