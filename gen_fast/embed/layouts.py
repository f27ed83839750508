"""Texts laid out as token sequences: what is run of them, and which rows are pooled.

The prompt's tokens are attended to and never pooled, except by WholeText, where the layout of
sentence-transformers decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gen_fast.errors import TextError, UnsupportedModelError
from gen_fast.formats.sentence_modules import Pooling
from gen_fast.model.generation import AnswerGenerator
from gen_fast.model.tokenizing import TextTokenizer, Tokenizer

ECHO_FIRST = "Rewrite the sentence: "
ECHO_SECOND = "\nRewritten sentence: "


@dataclass(frozen=True)
class Sequences:
    """Tokenised texts, ready to be packed.

    ids: all ids of a text, prompt included. shared [n]: leading ids that are the prompt's.
    needed [n]: last rows of the text that are pooled. counts [m]: sequences of each of m texts, one
    after another, whose vectors are averaged; None is one sequence a text.
    """

    ids: list[np.ndarray]
    shared: np.ndarray
    needed: np.ndarray
    counts: np.ndarray | None = None


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
    """What layouts that begin with the prompt and the text have in common."""

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
    """Text, then k special tokens (ids V … V + k - 1), the last n_compression of them pooled.

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
    """The text as it is; all its own tokens are pooled, or the last.

    method: for errors.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        max_length: int,
        *,
        method: str,
        last_only: bool = False,
    ) -> None:
        super().__init__(TextTokenizer(tokenizer, prompt, max_length))
        self._method = method
        self._last_only = last_only

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """See Layout. Raises TextError for a text without a token of its own."""
        ids, shared = self._text(texts)
        own = np.array([len(row) for row in ids], dtype=np.int64) - shared
        refuse_empty(own, self._method, first_row)
        return Sequences(ids, shared, np.ones_like(own) if self._last_only else own)


class WrittenAnswers(OwnTokens):
    """HyDE's: the text, and what the model answers to prompt + text: each a sequence of its own.

    The prompt stands before none of them. samples: answers a text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: str,
        max_length: int,
        writer: AnswerGenerator,
        samples: int,
    ) -> None:
        super().__init__(tokenizer, "", max_length, method="hyde")
        self._answer = TextTokenizer(tokenizer, "", max_length)
        self._prompt = prompt
        self._writer = writer
        self._samples = samples

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """See Layout. An answer without a token is left out."""
        own = super().__call__(texts, first_row)
        answers = self._writer.answers([self._prompt + text for text in texts], self._samples)
        written, shared = self._answer([answer.text for answer in answers])
        ids = [*own.ids, *written]
        shared = np.concatenate((own.shared, shared))
        needed = np.array([len(row) for row in ids], dtype=np.int64) - shared
        text = np.arange(len(texts))
        text = np.concatenate((text, text.repeat(self._samples)))
        order = np.argsort(text, kind="stable")
        order = order[needed[order] > 0]
        counts = np.bincount(text[order], minlength=len(texts))
        return Sequences([ids[i] for i in order], shared[order], needed[order], counts)


class Echo(_OneText):
    """The text twice, pooled over the second copy. Each copy gets half of max_length."""

    def __init__(self, tokenizer: Tokenizer, prompt: str, max_length: int) -> None:
        half = max_length // 2
        super().__init__(TextTokenizer(tokenizer, prompt + ECHO_FIRST, half))
        self._second = TextTokenizer(tokenizer, ECHO_SECOND, half, add_special_tokens=False)

    @property
    def truncated(self) -> int:
        """See Layout."""
        return self._second.truncated

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """See Layout. Raises TextError for a text without a token of its own."""
        first, shared = self._text(texts)
        second, template = self._second(texts)
        own = np.array([len(row) for row in second], dtype=np.int64) - template
        refuse_empty(own, "echo", first_row)
        ids = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
        return Sequences(ids, shared, own)


class WholeText(_OneText):
    """Prompt, text and special tokens, all of them pooled, or the first, or the last.

    Unless the layout leaves the prompt out: then its tokens are those that the prompt has alone,
    without a special token at its end, as sentence-transformers counts them.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, pooling: Pooling
    ) -> None:
        super().__init__(TextTokenizer(tokenizer, prompt, max_length))
        self._mode = pooling.mode
        self._counted = pooling.counted
        self._skipped = 0
        if prompt and not pooling.include_prompt:
            alone = tokenizer.core.encode(prompt)
            self._skipped = len(alone.ids) - alone.special_tokens_mask[-1]

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """See Layout. Raises TextError for a text without a token to pool."""
        ids, shared = self._text(texts)
        if self._counted is None:
            own = np.array([len(row) for row in ids], dtype=np.int64) - self._skipped
        else:
            own = np.array([self._last_counted(row) for row in ids], dtype=np.int64)
        refuse_empty(own, f"sentence-transformers ({self._mode})", first_row)
        if self._mode == "cls":
            # The state of the first token: in a causal model none after it has a part in that.
            ids = [row[: self._skipped + 1] for row in ids]
        needed = np.ones_like(own) if self._mode in ("cls", "lasttoken") else own
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        return Sequences(ids, np.minimum(shared, lengths - needed), needed)

    def _last_counted(self, ids: np.ndarray) -> int:
        """How many tokens count in the mean. They must be the last ones: only those are pooled."""
        assert self._counted is not None
        counted = self._counted[ids]
        number = int(counted.sum())
        if not counted[len(ids) - number :].all():
            raise UnsupportedModelError(
                "WordWeights leaves out a token between or behind those that count; only tokens "
                "before all others can be left out"
            )
        return number


def refuse_empty(own: np.ndarray, method: str, first_row: int) -> None:
    """Raise TextError for texts of which no row is pooled. own [n]: how many rows each has."""
    rows = tuple(int(i) + first_row for i in np.flatnonzero(own < 1))
    if rows:
        more = f"; so do {len(rows) - 1} more" if rows[1:] else ""
        raise TextError(
            f"row {rows[0]} has no token of its own (is it empty?), and method {method!r} pools "
            f"over those{more}",
            rows,
        )
