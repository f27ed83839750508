"""Teacher vectors of answers: computed once, kept beside them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gen_fast.embed.choices import SENTENCE_TRANSFORMERS
from gen_fast.embed.encoder import Encoder
from gen_fast.embed.loading import load
from gen_fast.embed.stock import load_stock
from gen_fast.errors import ConfigError, NonFiniteError
from gen_fast.io.embedding_files import EmbeddingMetadata, Embeddings, write_embeddings
from gen_fast.training.data import read_rows, teacher_texts
from gen_fast.training.records import Rejections
from gen_fast.training.report import hidden

logger = logging.getLogger(__name__)

# Texts to vectors [n, d], and how many of the texts lost their tail.
Embed = Callable[[Sequence[str]], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Taught:
    """How many vectors a teacher gave, and how many of their answers it truncated."""

    vectors: int
    truncated: int


def teach(
    answers: Sequence[str | Path],
    out: Path,
    teacher: str,
    *,
    method: str | None = None,
    backbone: str | Path | None = None,
    device: str | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
    show_progress_bar: bool | None = None,
) -> Taught:
    """Embed every answer with `teacher` and write ids, texts and vectors to `out`.

    Answers that are longer than the teacher reads are counted and logged.

    teacher: "minilm", a directory or Hub id of a sentence-transformers model, or, with `method`
    ("mean", "echo", … or "llm2vec-gen"), anything that `gen_fast.load` takes; backbone and quantize
    are then as there. With an LLM2Vec checkpoint method "llm2vec-bare" is the teacher of
    LLM2Vec-Gen's authors, "llm2vec" what the checkpoint itself embeds. Raises InputError,
    ConfigError, ModelNotFoundError, UnsupportedModelError, NonFiniteError, and as `load` does.
    """
    rejections = Rejections(out.with_name(f"{out.stem}.rejected.jsonl"))
    ids, texts = teacher_texts(read_rows(answers, rejections))
    rejections.write()
    if method is None:
        for option, value in (("backbone", backbone), ("quantize", quantize)):
            if value is not None:
                raise ConfigError(f"{option} has no meaning without a method")
        embed, name = _stock(teacher, device, dtype, show_progress_bar)
    else:
        encoder = load(
            teacher,
            method=method,
            backbone=backbone,
            device=device,
            dtype=dtype,
            quantize=quantize,
        )
        embed, name = _own(encoder, show_progress_bar)
    vectors, truncated = embed(texts)
    vectors = vectors.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise NonFiniteError(f"the teacher's vector of {ids[bad[0]]} is not finite", tuple(bad))
    metadata = EmbeddingMetadata(
        model=name,
        method=method or SENTENCE_TRANSFORMERS,
        prompt="",
        normalized=False,
        dimension=vectors.shape[1],
        model_dimension=vectors.shape[1],
        dtype=dtype,
        quantize=quantize or "",
    )
    write_embeddings(out, Embeddings(ids, vectors, texts, metadata))
    if truncated:
        logger.warning("%s read only the beginning of %d of %d answers", name, truncated, len(ids))
    return Taught(len(ids), truncated)


def _stock(
    teacher: str, device: str | None, dtype: str, show_progress_bar: bool | None
) -> tuple[Embed, str]:
    model = load_stock(teacher, device=device, dtype=dtype)

    def embed(texts: Sequence[str]) -> tuple[np.ndarray, int]:
        prompt = model.prompts.get(model.default_prompt_name) or ""
        vectors: np.ndarray = model.encode(
            list(texts), batch_size=64, show_progress_bar=show_progress_bar
        )
        longer = _longer(model.tokenizer, [prompt + text for text in texts], model.max_seq_length)
        return vectors, longer

    return embed, teacher


def _longer(tokenizer: Any, texts: Sequence[str], limit: int | None) -> int:
    """How many texts have more tokens than `limit`, with those that the tokenizer puts around."""
    if limit is None:
        return 0
    count = 0
    for start in range(0, len(texts), 1024):
        part = list(texts[start : start + 1024])
        ids = tokenizer(part, truncation=False, padding=False, verbose=False)["input_ids"]
        count += sum(len(row) > limit for row in ids)
    return count


def _own(encoder: Encoder, show_progress_bar: bool | None) -> tuple[Embed, str]:
    def embed(texts: Sequence[str]) -> tuple[np.ndarray, int]:
        with tqdm(total=len(texts), unit="text", disable=hidden(show_progress_bar)) as bar:
            (block,) = encoder.encode_blocks([texts], on_progress=bar.update)
        return block.embeddings, block.truncated

    return embed, encoder.name
