"""What is embedded: for each method, the ids that are run, the rows kept and how they are pooled.

llm2vec-gen   the trained compression tokens after the text (arXiv 2603.10913)
mean          mean over the text's own tokens
weighted-mean position-weighted mean, later tokens count more (SGPT, arXiv 2202.08904, eq. 2)
last-token    the state of the last token
echo          the text twice, mean over the second copy (arXiv 2402.15449)
hyde          the mean of an answer that the model writes to a query; a text behind the prompt
              named "document" is embedded as it is (HyDE, arXiv 2212.10496)
sentence-transformers  the whole text, as a directory in that package's layout says

The prompt's tokens are attended to and never pooled, except by the last, where the layout decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gen_fast.errors import TextError
from gen_fast.formats.sentence_transformers import Pooling
from gen_fast.model.generation import AnswerGenerator
from gen_fast.model.tokenizing import TextTokenizer, Tokenizer
from gen_fast.ops.norm import rms_norm

TRAINING_FREE = ("mean", "weighted-mean", "last-token", "echo", "hyde")

ECHO_FIRST = "Rewrite the sentence: "
ECHO_SECOND = "\nRewritten sentence: "


@dataclass(frozen=True)
class Sequences:
    """Tokenised texts, ready to be packed.

    ids: all ids of a text, prompt included. shared [n]: leading ids that are the prompt's.
    needed [n]: last rows of the text that are pooled.
    """

    ids: list[np.ndarray]
    shared: np.ndarray
    needed: np.ndarray


class Layout(Protocol):
    """Lays texts out as token sequences, for one call of `encode`."""

    @property
    def prompt_ids(self) -> np.ndarray:
        """Ids that many of the sequences begin with."""

    @property
    def truncated(self) -> int:
        """How many texts have lost their tail so far."""

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """Lay out `texts`, the rows of the input from `first_row` on."""


class _OneText:
    """What layouts of the prompt and the text once have in common."""

    def __init__(self, text: TextTokenizer) -> None:
        self._text = text

    @property
    def prompt_ids(self) -> np.ndarray:
        """See Layout."""
        return self._text.prompt_ids

    @property
    def truncated(self) -> int:
        """See Layout."""
        return self._text.truncated


class SpecialTokens(_OneText):
    """llm2vec-gen: text, then k special tokens (ids V … V + k - 1); the last k_comp are pooled.

    A text longer than max_length - k loses its tail, never a special token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        max_length: int,
        vocab_size: int,
        n_special: int,
        n_compression: int,
    ) -> None:
        super().__init__(TextTokenizer(tokenizer, prompt, max_length - n_special))
        self._special = np.arange(vocab_size, vocab_size + n_special, dtype=np.int32)
        self._needed = n_compression

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """See Layout. An empty text is its special tokens alone."""
        ids, shared = self._text(texts)
        full = [np.concatenate((row, self._special)) for row in ids]
        return Sequences(full, shared, np.full(len(full), self._needed))


class OwnTokens(_OneText):
    """mean, weighted-mean and last-token: the text as it is, or the answer to it (hyde)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        max_length: int,
        method: str,
        generator: AnswerGenerator | None = None,
    ) -> None:
        # HyDE's prompt goes to the writer; what is embedded is the bare answer.
        super().__init__(TextTokenizer(tokenizer, "" if generator else prompt, max_length))
        self._prompt = prompt
        self._method = method
        self._generator = generator

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """See Layout. Raises TextError for a text without a token of its own."""
        if self._generator is not None:
            prompted = [self._prompt + text for text in texts]
            texts = [answer.text for answer in self._generator.answers(prompted)]
        ids, shared = self._text(texts)
        own = np.array([len(row) for row in ids], dtype=np.int64) - shared
        _refuse_empty(own, self._method, first_row)
        return Sequences(ids, shared, np.ones_like(own) if self._method == "last-token" else own)


class Echo:
    """echo: the text twice, pooled over the second copy. Each copy gets half of max_length."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, max_length: int) -> None:
        half = max_length // 2
        self._first = TextTokenizer(tokenizer, prompt + ECHO_FIRST, half)
        self._second = TextTokenizer(tokenizer, ECHO_SECOND, half, add_special_tokens=False)

    @property
    def prompt_ids(self) -> np.ndarray:
        """See Layout."""
        return self._first.prompt_ids

    @property
    def truncated(self) -> int:
        """See Layout."""
        return self._second.truncated

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """See Layout. Raises TextError for a text without a token of its own."""
        first, shared = self._first(texts)
        second, template = self._second(texts)
        own = np.array([len(row) for row in second], dtype=np.int64) - template
        _refuse_empty(own, "echo", first_row)
        ids = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
        return Sequences(ids, shared, own)


class WholeText(_OneText):
    """sentence-transformers: prompt, text and special tokens, all of them pooled.

    Unless the layout leaves the prompt out: then its tokens are those that the prompt has alone,
    without a special token at its end, as sentence-transformers counts them.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, pooling: Pooling
    ) -> None:
        super().__init__(TextTokenizer(tokenizer, prompt, max_length))
        self._mode = pooling.mode
        self._skipped = 0
        if prompt and not pooling.include_prompt:
            alone = tokenizer.core.encode(prompt)
            self._skipped = len(alone.ids) - alone.special_tokens_mask[-1]

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """See Layout. Raises TextError for a text without a token to pool."""
        ids, shared = self._text(texts)
        own = np.array([len(row) for row in ids], dtype=np.int64) - self._skipped
        _refuse_empty(own, f"sentence-transformers ({self._mode})", first_row)
        if self._mode == "cls":
            # The state of the first token: in a causal model none after it has a part in that.
            ids = [row[: self._skipped + 1] for row in ids]
        needed = np.ones_like(own) if self._mode in ("cls", "lasttoken") else own
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        return Sequences(ids, np.minimum(shared, lengths - needed), needed)


def _refuse_empty(own: np.ndarray, method: str, first_row: int) -> None:
    rows = tuple(int(i) + first_row for i in np.flatnonzero(own < 1))
    if rows:
        more = f"; so do {len(rows) - 1} more" if rows[1:] else ""
        raise TextError(
            f"row {rows[0]} has no token of its own (is it empty?), and method {method!r} pools "
            f"over those{more}",
            rows,
        )


def row_weights(needed: Sequence[int], lengths: np.ndarray, mode: str) -> np.ndarray | None:
    """Pooling weights of the packed rows, float32; None for the plain mean.

    needed: rows of each text that are pooled, its last ones; lengths: all rows of each text.
    mode: a method, or the pooling mode of a sentence-transformers layout, whose weighted mean
    counts positions from the beginning of the text, whatever is pooled.
    """
    if mode == "mean_sqrt_len_tokens":
        return np.repeat(1 / np.sqrt(needed), needed).astype(np.float32)
    if mode not in ("weighted-mean", "weightedmean"):
        return None
    starts = lengths - needed if mode == "weightedmean" else np.zeros_like(lengths)
    positions = [
        np.arange(1, n + 1, dtype=np.float64) + start
        for n, start in zip(needed, starts, strict=True)
    ]
    return np.concatenate([row / row.sum() for row in positions]).astype(np.float32)


def max_rows(hidden: Tensor, needed: Sequence[int], norm_weight: Tensor, eps: float) -> Tensor:
    """The largest value of each dimension over the normed rows of each text: [B, h] float32.

    hidden [R, h]: the pooled rows before the final norm, `needed[i]` of text i.
    """
    rows = rms_norm(hidden.float(), norm_weight.float(), eps)
    return torch.stack([part.amax(0) for part in rows.split(list(needed))])
