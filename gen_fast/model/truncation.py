"""The first tokens of a long text without tokenising all of it, and exactly those.

A byte-pair encoding works within pieces, and known pre-tokenizers never let a piece reach across
some places, such as a space after another character. What stands before such a place is tokenised
alike whatever follows. So a long text is cut at one of them, a little behind the last token that is
asked for. Where nothing can be proved the whole text is tokenised.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

# A text of fewer characters than this, and than so many for each token that is asked for, is
# tokenised whole: a measured estimate would not pay.
_SHORT = 1024
_SHORT_PER_TOKEN = 8
# Characters whose tokens are counted to estimate how many a text has for each.
_PROBE = 256
_MARGIN = 1.15

# Pieces of a text by published pre-tokenizers: GPT-2's, which is also ByteLevel's own, Qwen2's and
# Llama 3's. In each a letter is followed, within its piece, by letters alone, and a space stands
# only at the beginning of a piece or in one of white space.
GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN_PIECES = (GPT2_PIECES, QWEN2_PIECES, LLAMA3_PIECES)
_LETTERS = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
_FOLLOWING_A_LETTER = '\n\t.,;:!?()[]{}<>=+*/"#%&|~，。、；：？！…「」（）'  # noqa: RUF001
_SPACE = " "
_SPACE_MARK = "\u2581"  # SentencePiece's spelling of a space


@dataclass(frozen=True)
class SafeCuts:
    """Places where a text may be cut without changing the tokens before.

    pattern: matches, with no width, at each of them.
    """

    pattern: re.Pattern[str]

    @classmethod
    def of(cls, core: RustTokenizer) -> "SafeCuts | None":
        """Those of a tokenizer that reads special tokens as text; None if it is of no known kind.

        Known are byte-pair encodings over bytes with the pieces of `_KNOWN_PIECES`, and those of
        SentencePiece's kind, whose vocabulary then says which characters end a token.
        """
        content = json.loads(core.to_str())
        model = content["model"]
        if model.get("type") != "BPE" or model.get("dropout"):
            return None
        # Others than special tokens are found in a text, and must not be cut in two.
        added = [token["content"] for token in content["added_tokens"] if not token["special"]]
        if any(re.search(rf"\S{_SPACE}", token) for token in added):
            return None
        if _is_byte_level(content):
            following = _FOLLOWING_A_LETTER
        elif _is_sentencepiece(content):
            # Without pieces, a place is safe if no token of the vocabulary reaches across it.
            inside = {c for token in model["vocab"] for c in token.lstrip(_SPACE_MARK)[1:]}
            if _SPACE_MARK in inside:
                return None
            following = "".join(c for c in _FOLLOWING_A_LETTER if c not in inside)
        else:
            return None
        following = "".join(
            c
            for c in following
            if not any(re.search(f"[{_LETTERS}]{re.escape(c)}", token) for token in added)
        )
        # A mark may stand where a space does, and two of them may be one token.
        places = [rf"(?<=[^\s{_SPACE_MARK}])(?={_SPACE})"]
        if following:
            places.append(f"(?<=[{_LETTERS}])(?=[{re.escape(following)}])")
        return cls(re.compile("|".join(places)))

    def cut(self, text: str, start: int) -> str:
        """`text` up to the first safe place from character `start` on; all of it without one."""
        place = self.pattern.search(text, start)
        return text if place is None else text[: place.start()]


class LeadingTokens:
    """The first tokens of texts, by a tokenizer that reads special tokens as text."""

    def __init__(self, core: RustTokenizer) -> None:
        self._core = core

    @cached_property
    def _cuts(self) -> SafeCuts | None:
        return SafeCuts.of(self._core)

    def __call__(self, texts: Sequence[str], limit: int) -> tuple[list[np.ndarray], int]:
        """The first `limit` ids of each text, int32, no special ones; how many texts had more."""
        heads = list(texts)
        short = max(_SHORT, _SHORT_PER_TOKEN * limit)
        long = [i for i, text in enumerate(texts) if len(text) > short]
        if long and (cuts := self._cuts) is not None:
            probes = self._ids([texts[i][:_PROBE] for i in long])
            for i, probe in zip(long, probes, strict=True):
                heads[i] = cuts.cut(texts[i], _enough(_PROBE, len(probe), limit))
        rows = self._ids(heads)
        # What was cut too early is cut later, by what its own head has shown.
        while early := [
            i for i, row in enumerate(rows) if len(row) <= limit and len(heads[i]) < len(texts[i])
        ]:
            assert cuts is not None
            for i in early:
                tried = len(heads[i])
                enough = _enough(tried, len(rows[i]), limit)
                heads[i] = cuts.cut(texts[i], max(enough, tried + 1))
            for i, row in zip(early, self._ids([heads[i] for i in early]), strict=True):
                rows[i] = row
        truncated = sum(len(row) > limit for row in rows)
        return [row[:limit] for row in rows], truncated

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._core.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _enough(characters: int, tokens: int, limit: int) -> int:
    """Characters that hold more than `limit` tokens, if all are as those that held `tokens`."""
    return int(_MARGIN * (limit + 1) * characters / max(tokens, 1))


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Whether the pieces are those of `_KNOWN_PIECES`, over bytes."""
    if (content["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return False
    pieces = content["pre_tokenizer"] or {}
    steps = pieces.get("pretokenizers") or [pieces]
    *splits, last = steps
    if last.get("type") != "ByteLevel":
        return False
    if last.get("use_regex"):  # GPT-2's pieces, of which digits may be cut out before
        return all(step.get("type") == "Digits" for step in splits)
    return (
        len(splits) == 1
        and splits[0].get("type") == "Split"
        and splits[0].get("behavior") == "Isolated"
        and not splits[0].get("invert")
        and splits[0].get("pattern", {}).get("Regex") in _KNOWN_PIECES
    )


def _is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether spaces become marks, and nothing else is changed before a plain pair encoding."""
    if any(content["model"].get(key) for key in ("ignore_merges", "end_of_word_suffix")):
        return False
    normalizer = content["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer.get("normalizers", [normalizer])
    replaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": _SPACE_MARK}
    if not all(step == replaces or step["type"] == "Prepend" for step in steps):
        return False
    pieces = content["pre_tokenizer"]
    if pieces is None:
        return replaces in steps
    return bool(pieces["type"] == "Metaspace" and pieces["replacement"] == _SPACE_MARK)
