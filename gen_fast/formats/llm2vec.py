"""LLM2Vec checkpoints, as they are published and as the package llm2vec 0.2.3 writes them.

A MNTP adapter lies over a base model, a SimCSE or supervised adapter over the two merged, or the
weights are written whole. No code from them is run: what their classes do to the base's, attention
to all tokens, the backbone computes. Source: arXiv 2404.05961; llm2vec 0.2.3, llm2vec/llm2vec.py.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gen_fast.errors import (
    AdapterError,
    BackboneMismatchError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightsError,
)
from gen_fast.formats.peft import (
    TRAINED_OVER,
    PeftAdapter,
    is_adapter,
    read_adapter,
    read_auto_class,
    read_base,
)
from gen_fast.io.checksums import problem, record
from gen_fast.io.durable import file_sha256, write_whole
from gen_fast.model.config import LLM2VEC_CLASSES, class_names, parse_config
from gen_fast.model.lora import LoraWeights
from gen_fast.model.model_files import read_json
from gen_fast.model.sources import is_hub_id, resolve
from gen_fast.model.weights import read_fingerprint

logger = logging.getLogger(__name__)

SETTINGS = "llm2vec_config.json"
POOLING_MODES = ("mean", "weighted_mean", "eos_token", "last_token")
# Published names: X-mntp, and over it X-mntp-unsup-simcse and X-mntp-supervised.
_OVER_MNTP = re.compile(r"(.+-mntp)-(?:unsup-simcse|supervised)")


@dataclass(frozen=True)
class Settings:
    """llm2vec_config.json: how states are pooled and long texts cut.

    max_length: tokens of a text with all around it. doc_max_length: tokens of the text alone, cut
    between words; None cuts none. skip_instruction: pool over the text's tokens alone.
    """

    pooling_mode: str = "mean"
    max_length: int = 512
    doc_max_length: int | None = 400
    skip_instruction: bool = True


@dataclass(frozen=True)
class Wrapper:
    """What stands around instruction and text, special tokens in it recognised."""

    before: str = ""
    after: str = ""

    def __bool__(self) -> bool:
        return bool(self.before or self.after)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, and all that it was trained over.

    source: the base model's directory. adapters: in the order in which they are merged into it.
    tokenizer: the directory whose tokenizer it is.
    """

    source: Path
    adapters: tuple[LoraWeights, ...]
    tokenizer: Path
    settings: Settings
    wrapper: Wrapper


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory says that it is an LLM2Vec model, adapter or not."""
    if (directory / SETTINGS).is_file():
        return True
    if is_adapter(directory) and read_auto_class(directory) in LLM2VEC_CLASSES:
        return True
    return bool(LLM2VEC_CLASSES & class_names(_config_in(directory)))


def read_checkpoint(directory: Path, name: str, backbone: str | Path | None = None) -> Checkpoint:
    """Read a checkpoint's settings and adapters; a plain model is one without adapters.

    name: what `directory` was asked for by, a path or Hub id. backbone: what the adapter is put on,
    as the reference's base_model_name_or_path: the directory of the MNTP adapter below it, or the
    base model, also where another adapter lies between the two.
    Raises ModelNotFoundError naming a link that is missing, BackboneMismatchError for an adapter of
    another base, and as `gen_fast.formats.peft.read_adapter` does.
    """
    settings = read_settings(directory)
    if not is_adapter(directory):
        model_name = _name_in(directory) or (name if is_hub_id(name) else "")
        family = str(_config_in(directory).get("model_type"))
        wrapper = wrapper_of(model_name, family, settings.pooling_mode)
        return Checkpoint(directory, (), directory, settings, wrapper)
    links, source = _chain(directory, name, backbone)
    for link in links:
        _check_config(link, source)
    adapters = [read_adapter(link) for link in reversed(links)]
    _check_fingerprints(adapters, source)
    # The reference's base_model_name_or_path: it decides tokenizer and wrapper.
    below = links[1] if len(links) > 1 else directory if _config_in(directory) else source
    recorded = read_base(links[-1])[0] or ""
    names = (_name_in(below), recorded if "/" in recorded else "", _name_in(source))
    model_name = next(filter(None, names), "")
    family = str(_config_in(source).get("model_type"))
    return Checkpoint(
        source=source,
        adapters=tuple(adapter.weights for adapter in adapters),
        tokenizer=below if (below / "tokenizer.json").is_file() else source,
        settings=settings,
        wrapper=wrapper_of(model_name, family, settings.pooling_mode),
    )


def read_settings(directory: Path) -> Settings:
    """llm2vec_config.json, or the defaults without one.

    Raises AdapterError for values without meaning, UnsupportedModelError for a pooling mode or key
    that is not known.
    """
    path = directory / SETTINGS
    if not path.is_file():
        return Settings()
    if wrong := problem(directory, SETTINGS):
        raise AdapterError(wrong)
    try:
        values = read_json(path)
    except WeightsError as error:
        raise AdapterError(str(error)) from error
    known = {field.name: type(getattr(Settings(), field.name)) for field in fields(Settings)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UnsupportedModelError(f"{path}: {unknown[0]} {values[unknown[0]]!r} is not supported")
    for key, value in values.items():
        if value is None and key == "doc_max_length":  # no limit of its own
            continue
        if type(value) is not known[key] or (known[key] is int and value < 1):
            raise AdapterError(f"{path}: {key} {value!r} has no meaning")
    settings = Settings(**values)
    if settings.pooling_mode not in POOLING_MODES:
        raise UnsupportedModelError(
            f"{path}: pooling_mode {settings.pooling_mode!r} is not supported, only "
            f"{', '.join(POOLING_MODES)}"
        )
    return settings


def write_settings(directory: str | Path, settings: Settings) -> None:
    """Write llm2vec_config.json, by which a directory is known as LLM2Vec's.

    No doc_max_length is written as max_length, which cuts as little: the reference takes numbers.
    """
    values = asdict(settings)
    values["doc_max_length"] = settings.doc_max_length or settings.max_length
    path = Path(directory) / SETTINGS
    write_whole(path, json.dumps(values, indent=4) + "\n")
    record(path.parent, {SETTINGS: file_sha256(path)})


def wrapper_of(model_name: str, family: str, pooling_mode: str) -> Wrapper:
    """What the reference puts around a text, by the base model's name and family.

    Raises UnsupportedModelError for eos_token with a family of which the reference does not say the
    end token. Source: llm2vec 0.2.3, LLM2Vec.prepare_for_tokenization.
    """
    if model_name == "meta-llama/Meta-Llama-3-8B-Instruct":
        return Wrapper("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")
    before, after = "", ""
    if model_name in ("mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Llama-2-7b-chat-hf"):
        before, after = "[INST] ", " [/INST]"
    elif model_name in ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-7B-Instruct"):
        before, after = "<|im_start|>user\n", "<|im_end|>"
    if pooling_mode == "eos_token":
        if model_name == "meta-llama/Meta-Llama-3-8B":
            after += "<|end_of_text|>"
        elif family in ("llama", "mistral"):
            after += " </s>"
        elif family == "qwen2":
            after += "<|endoftext|>"
        else:
            raise UnsupportedModelError(
                f"pooling_mode 'eos_token' is not supported for {family}: llm2vec does not say "
                "which token ends its texts"
            )
    return Wrapper(before, after)


def _chain(directory: Path, name: str, backbone: str | Path | None) -> tuple[list[Path], Path]:
    """Adapters, the outermost first, and the directory of the base model below them."""
    given = None if backbone is None else resolve(backbone)
    links = [directory]
    if given is not None and is_adapter(given):
        links.append(given)
        given = None
    while True:
        link = links[-1]
        below = _below(link, name if link is directory else str(link), given, link is directory)
        if not is_adapter(below):
            return links, below
        if below.resolve() in [other.resolve() for other in links]:
            raise AdapterError(f"{below} is an adapter that is put on itself, its files say")
        links.append(below)


def _below(link: Path, name: str, given: Path | None, is_outermost: bool) -> Path:
    """What an adapter was trained over: another adapter's directory, or the base model's.

    name: what the link was asked for by. given: the base model, if the caller said where it lies.
    """
    base, revision = read_base(link)
    published = _OVER_MNTP.fullmatch(name.rstrip("/").rpartition("/")[2])
    if published and not _names_mntp(base):
        # The published records name the base model; what lies between is told by the names.
        owner = name.rpartition("/")[0] if is_hub_id(name) else ""
        base, revision = f"{owner}/{published[1]}".removeprefix("/"), None
    if base is None:
        if given is not None:
            return given
        raise ModelNotFoundError(
            f"{link}/adapter_config.json does not name the model that the adapter was trained "
            "over: give backbone=, its directory or that of the MNTP adapter"
        )
    found = _find(base, link)
    if _names_mntp(base) or (found is not None and is_adapter(found)):
        return found or _resolved(base, revision, link, "the MNTP adapter")
    # What LLM2Vec.save writes looks the same over a base model and over a merged MNTP adapter.
    if is_outermost and (link / SETTINGS).is_file() and not (link / TRAINED_OVER).is_file():
        if given is None and not _config_in(link):
            raise ModelNotFoundError(
                f"{link} names the base model {base!r}, and no file says whether an MNTP adapter "
                "was merged into it first: give backbone=, the directory of the MNTP adapter, or "
                "else that of the base model"
            )
        if given is not None and not _config_in(link):
            logger.warning(
                "%s is put on %s itself: if it was trained over an MNTP adapter, give that one's "
                "directory as backbone",
                link,
                given,
            )
    return given or found or _resolved(base, revision, link, "the base model")


def _names_mntp(base: str | None) -> bool:
    return base is not None and base.rstrip("/").endswith("-mntp")


def _find(name: str, link: Path) -> Path | None:
    """A directory that a link's record names: as it is, from the link, or beside the link."""
    beside = link.resolve().parent / Path(name).name
    places = [Path(name), link / name, beside]
    return next((p for p in places if p.is_dir() and p.resolve() != link.resolve()), None)


def _resolved(name: str, revision: str | None, link: Path, what: str) -> Path:
    """The directory of a known name, a GGUF file or a Hub id."""
    try:
        return resolve(name, revision)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"{link} was trained over {what} {name!r}, which was not found ({error}): lay it "
            f"beside {link} as {Path(name).name}, or give backbone=, its directory"
        ) from error


def _check_config(link: Path, source: Path) -> None:
    """Compare the base's config.json that a published adapter brings with the base's own."""
    values = _config_in(link)
    if not values:
        return
    theirs = parse_config(values, bidirectional=True)
    ours = parse_config(read_json(source / "config.json"), bidirectional=True)
    for field in fields(theirs):
        pair = getattr(theirs, field.name), getattr(ours, field.name)
        # Neither the head nor the longest text changes a state.
        if pair[0] != pair[1] and field.name not in ("tied_head", "max_positions"):
            raise BackboneMismatchError(
                f"{link}/config.json has {field.name} {pair[0]!r}, its base model {source} "
                f"{pair[1]!r}"
            )


def _check_fingerprints(adapters: Sequence[PeftAdapter], source: Path) -> None:
    """Adapters that say what they were trained over lie over that: the base, others merged."""
    below: list[LoraWeights] = []
    for adapter in adapters:
        if adapter.fingerprint:
            actual = read_fingerprint(source, adapters=below, bidirectional=True)
            adapter.check_fingerprint(actual)
        below.append(adapter.weights)


def _config_in(directory: Path) -> Mapping[str, Any]:
    path = directory / "config.json"
    return read_json(path) if path.is_file() else {}


def _name_in(directory: Path) -> str:
    """The model that a directory was made of, as transformers keeps it in config.json."""
    return str(_config_in(directory).get("_name_or_path") or "")
