"""Tiny random models in sentence-transformers' layout, written by that package itself."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import processors
from transformers import AutoModel

from gen_fast.testing import byte_tokenizer, tiny_config

# Lengths from one token to more than any maximum length used here.
TEXTS = ["x", "the cat", "a hat in the rain", "one word follows the other in the line " * 4]
LAYERS = 2
HIDDEN = 48
OLD_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
SPECIAL_TOKENS = {
    "eos": "$A <|im_end|>",
    "bos": "<|im_start|> $A",
    "both": "<|im_start|> $A <|im_end|>",
}


def save_backbone(directory: Path, family: str = "qwen3", special: str = "eos") -> Path:
    """A random model and its tokenizer, which puts `special` around a text: SPECIAL_TOKENS."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.pad_token = tokenizer.eos_token
    if special in SPECIAL_TOKENS:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=SPECIAL_TOKENS[special],
            special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
        )
    save_random_model(directory, tiny_config(family, len(tokenizer)))
    tokenizer.save_pretrained(directory)
    return directory


def save_random_model(directory: Path, config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)


def save_layout(
    directory: Path,
    backbone: Path,
    pooling: str | Sequence[str] = "mean",
    modules: Iterable[torch.nn.Module] = (),
    *,
    include_prompt: bool = True,
    max_seq_length: int | None = None,
    **options: Any,
) -> Path:
    """`options` are those of SentenceTransformer: prompts, default_prompt_name, truncate_dim, …"""
    torch.manual_seed(1)
    first = Transformer(str(backbone), max_seq_length=max_seq_length)
    pool = Pooling(HIDDEN, pooling, include_prompt=include_prompt)
    SentenceTransformer(modules=[first, pool, *modules], device="cpu", **options).save(
        str(directory), create_model_card=False
    )
    return directory


def dense(activation: type[torch.nn.Module], size: int = 20, bias: bool = True) -> Dense:
    torch.manual_seed(2)
    return Dense(HIDDEN, size, bias=bias, activation_function=activation())


def normalize() -> Normalize:
    return Normalize()


def as_written_before(directory: Path, *, max_seq_length: int | None = None) -> None:
    """Rewrite a directory with the names, flags and folders of releases 2 to 5."""
    modules = json.loads((directory / "modules.json").read_text())
    for entry in modules:
        entry["type"] = f"sentence_transformers.models.{entry['type'].rsplit('.', 1)[1]}"
        if entry["type"].endswith("Normalize"):
            shutil.rmtree(directory / entry["path"])
    modules[0]["path"] = "0_Transformer"
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "0_Transformer").mkdir()
    for path in [path for path in directory.iterdir() if path.is_file()]:
        if path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(directory / "0_Transformer" / path.name)
    text = {"max_seq_length": max_seq_length, "do_lower_case": False}
    (directory / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps(text))
    path = directory / "1_Pooling" / "config.json"
    pooling = json.loads(path.read_text())
    flags = {flag: mode == pooling["pooling_mode"] for mode, flag in OLD_POOLING_FLAGS.items()}
    path.write_text(json.dumps({"word_embedding_dimension": HIDDEN, **flags}))
    path = directory / "config_sentence_transformers.json"
    settings = json.loads(path.read_text())
    del settings["model_type"]
    path.write_text(json.dumps(settings))


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a JSON file; None deletes a key."""
    values = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def reference(directory: Path, **options: Any) -> SentenceTransformer:
    return SentenceTransformer(
        str(directory), device="cpu", model_kwargs={"dtype": torch.float32}, **options
    )


def assert_same(actual: Any, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
