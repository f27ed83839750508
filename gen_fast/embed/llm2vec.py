"""LLM2Vec: a decoder run without its causal mask, the text's states averaged (arXiv 2404.05961).

llm2vec       as the package llm2vec 0.2.3 encodes: instruction and text, a chat wrapper by the
              model's name, the text's own tokens pooled
llm2vec-bare  the mean over all tokens of the bare text, special ones included: the teacher of
              LLM2Vec-Gen (llm2vec-gen 0.1.3, losses.py, get_teacher_embeddings)
"""

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np

from gen_fast.embed.choices import LLM2VEC_BARE
from gen_fast.embed.layouts import Layout, Sequences, refuse_empty
from gen_fast.embed.methods import Method, position_weights
from gen_fast.errors import PromptError
from gen_fast.formats.llm2vec import Checkpoint, Settings, Wrapper
from gen_fast.model.tokenizing import Tokenizer, special_tokens_around


class LLM2Vec(Method):
    """llm2vec and llm2vec-bare: a checkpoint's, or training-free those of a plain backbone."""

    mask: ClassVar[str] = "bidirectional"

    def __init__(self, name: str, checkpoint: Checkpoint) -> None:
        super().__init__(name)
        self._settings, self._wrapper = checkpoint.settings, checkpoint.wrapper
        if name == LLM2VEC_BARE:
            self._settings = Settings(
                "mean", self._settings.max_length, doc_max_length=None, skip_instruction=False
            )
            self._wrapper = Wrapper()
        self.max_length = self._settings.max_length

    def layout(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, prompt_name: str | None
    ) -> Layout:
        """See Method."""
        return InstructedText(tokenizer, prompt, max_length, self._settings, self._wrapper)

    def row_weights(self, needed: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """See Method."""
        return position_weights(needed) if self._settings.pooling_mode == "weighted_mean" else None

    def identity(self) -> dict[str, Any]:
        """See Method."""
        return {
            "adapter": None,
            "max_length": self.max_length,
            "llm2vec": {**asdict(self._settings), "wrapper": asdict(self._wrapper)},
        }


class InstructedText:
    """Wrapper, instruction, text, wrapper; pooled are the last rows, as many as the text's tokens.

    These are counted by tokenising the text, with the end of the wrapper, alone. No row is shared:
    under a bidirectional mask the instruction's states depend on the text.
    """

    prompt_ids = np.empty(0, dtype=np.int32)

    def __init__(
        self,
        tokenizer: Tokenizer,
        instruction: str,
        max_length: int,
        settings: Settings,
        wrapper: Wrapper,
    ) -> None:
        self.truncated = 0
        self._tokenizer, self._settings, self._wrapper = tokenizer, settings, wrapper
        self._max_length = max_length
        self._before, self._after = special_tokens_around(tokenizer.core)
        self._room = max_length - len(self._before) - len(self._after)
        joined = f"{instruction.strip()} " if instruction else ""
        # One token more tells whether a text was cut.
        self._whole = _Template(tokenizer, wrapper.before, joined, wrapper.after, max_length + 1)
        self._own = None
        if wrapper.before or joined:
            self._own = _Template(tokenizer, "", "", wrapper.after, max_length)
        taken = len(self._whole([""])[0])
        if taken >= self._room:
            raise PromptError(
                f"the prompt and what stands around a text take {taken} tokens and leave no room "
                f"for text: {self._room} are allowed (raise max_length)"
            )

    def __call__(self, texts: Sequence[str], first_row: int) -> Sequences:
        """See Layout. Raises TextError for a text without a token to pool."""
        shortened = self._cut_between_words(texts)
        is_cut = [short is not text for short, text in zip(shortened, texts, strict=True)]
        if self._wrapper:
            shortened = [text.rstrip() for text in shortened]
        whole = self._whole(shortened)
        counted = whole if self._own is None else self._own(shortened)
        ids = [np.concatenate((self._before, row[: self._room], self._after)) for row in whole]
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        own = np.array([min(len(row), self._max_length) for row in counted], dtype=np.int64)
        needed = np.minimum(own, lengths) if self._settings.skip_instruction else lengths
        refuse_empty(needed, "llm2vec", first_row)
        self.truncated += sum(
            cut or len(row) > self._room for cut, row in zip(is_cut, whole, strict=True)
        )
        if self._settings.pooling_mode in ("eos_token", "last_token"):
            needed = np.ones_like(needed)
        return Sequences(ids, np.zeros_like(needed), needed)

    def _cut_between_words(self, texts: Sequence[str]) -> list[str]:
        """Texts of more than doc_max_length tokens lose words until they have no more.

        Source: llm2vec 0.2.3, LLM2Vec._convert_to_str. A first word longer than that, of which the
        reference leaves nothing, is cut behind so many tokens.
        """
        limit, texts = self._settings.doc_max_length, list(texts)
        if limit is None or limit >= self._max_length:
            return texts
        rows, _ = self._tokenizer.leading(texts, self._max_length)
        for i, row in enumerate(rows):
            text, count = texts[i], len(row)
            words = text.split() if count > limit else []
            while count > limit:
                words = words[: int(len(words) * (limit / count))]
                if not words:
                    offsets = self._tokenizer.core.encode(text, add_special_tokens=False).offsets
                    texts[i] = text[: offsets[limit - 1][1]]
                    break
                texts[i] = " ".join(words)
                ((row,), _) = self._tokenizer.leading([texts[i]], self._max_length)
                count = len(row)
        return texts


class _Template:
    """The first tokens of before + instruction + text + after.

    Special tokens are recognised in before and after, and read as text in the other two.
    """

    def __init__(
        self, tokenizer: Tokenizer, before: str, instruction: str, after: str, limit: int
    ) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._before, self._instruction, self._after = before, instruction, after
        added = tokenizer.core.get_added_tokens_decoder()
        self._special_ids = {token.content: i for i, token in added.items() if token.special}
        names = sorted(self._special_ids, key=len, reverse=True)
        # With none, something that never matches.
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._has_special = bool(self._special.search(f"{before}\n{after}"))

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids, int32, at most `limit`, without what the tokenizer puts around."""
        own = [self._instruction + text for text in texts]
        joined = [self._before + text + self._after for text in own]
        if not self._has_special:
            rows, _ = self._tokenizer.leading(joined, self._limit)
            return rows
        encodings = self._tokenizer.backend.encode_batch_fast(joined, add_special_tokens=False)
        return [
            np.array(
                self._piecewise(text) if self._special.search(text) else encoding.ids,
                dtype=np.int32,
            )[: self._limit]
            for text, encoding in zip(own, encodings, strict=True)
        ]

    def _piecewise(self, text: str) -> list[int]:
        """Ids of a text that spells a special token: what lies between the template's, alone."""
        core = self._tokenizer.core
        ids: list[int] = []
        start, whole = 0, self._before + text + self._after
        around = range(len(self._before), len(self._before) + len(text))
        for match in self._special.finditer(whole):
            if match.start() in around or match.end() - 1 in around:
                continue
            ids += core.encode(whole[start : match.start()], add_special_tokens=False).ids
            ids.append(self._special_ids[match[0]])
            start = match.end()
        return ids + list(core.encode(whole[start:], add_special_tokens=False).ids)
