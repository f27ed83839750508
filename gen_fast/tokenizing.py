"""Text to token ids: checked, truncated, and split into shared prompt tokens and own tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gen_fast.errors import ModelNotFoundError, PromptError, TextError, TextTypeError
from gen_fast.weights import read_json


def load_tokenizer(directory: str | Path) -> Any:
    """Load the fast tokenizer of a model directory. Never runs code from it."""
    from transformers import AutoTokenizer

    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFoundError(
            f"{directory} has no tokenizer.json; a fast (Rust) tokenizer is needed"
        )
    read_json(path)  # a damaged file is named, before transformers guesses at it
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def without_special_tokens(tokenizer: Any) -> Any:
    """A copy of a transformers tokenizer's Rust core that reads special tokens in text as text.

    A copy, because these are settings of the object. It costs a tenth of a second: make it once.
    """
    rust = tokenizer.backend_tokenizer
    copy = type(rust).from_str(rust.to_str())
    copy.encode_special_tokens = True
    copy.no_padding()
    copy.no_truncation()
    return copy


def check_texts(texts: Sequence[object]) -> None:
    """Raise TextTypeError or TextError naming the first bad row.

    Refused: anything but `str`, and lone surrogates, which have no UTF-8 form.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TextTypeError(
                f"row {row}: expected str, got {type(text).__name__} ({text!r:.60})", (row,)
            )
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise TextError(
                    f"row {row}: lone surrogate {text[error.start]!a} at character {error.start} "
                    "has no UTF-8 form",
                    (row,),
                ) from error


class TextTokenizer:
    """Tokenises prompt + text, with the core that `without_special_tokens` gives.

    prompt_ids: the ids of the prompt alone, with the tokenizer's own leading token if it has one.
    The prompt is tokenised together with the text; `shared` counts the leading ids that are those
    of the prompt alone, so that they may come from the prefix cache. One thread at a time.
    """

    def __init__(
        self, rust: Any, prompt: str, max_tokens: int, *, add_special_tokens: bool = True
    ) -> None:
        self._rust = rust
        self._add_special_tokens = add_special_tokens
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.truncated = 0
        self.prompt_ids = self._encode([""])[0]
        if len(self.prompt_ids) >= max_tokens:
            raise PromptError(
                f"the prompt takes {len(self.prompt_ids)} tokens and leaves no room for text: "
                f"{max_tokens} are allowed (raise max_length)"
            )

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        joined = [self.prompt + text for text in texts] if self.prompt else list(texts)
        encodings = self._rust.encode_batch_fast(
            joined, add_special_tokens=self._add_special_tokens
        )
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def __call__(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the ids of prompt + text, truncated to max_tokens, and their `shared` counts."""
        ids = self._encode(texts)
        self.truncated += sum(len(row) > self.max_tokens for row in ids)
        ids = [row[: self.max_tokens] for row in ids]
        return ids, np.array([self._shared(row) for row in ids], dtype=np.int64)

    def _shared(self, ids: np.ndarray) -> int:
        n = min(len(ids), len(self.prompt_ids))
        differs = np.flatnonzero(ids[:n] != self.prompt_ids[:n])
        return int(differs[0]) if len(differs) else n
