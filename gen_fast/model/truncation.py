"""The first tokens of a long text without tokenising all of it, and exactly those.

A byte-pair encoding works within pieces, and known pre-tokenizers never let a piece reach across
some places, such as a space after another character. What stands before such a place is tokenised
alike whatever follows. So a long text is cut at one of them, a little behind the last token that is
asked for.

A text without such a place, such as megabytes of one letter, is cut anywhere, and its tokens are
proved. A merge never reaches across a boundary of two tokens of the whole text, so the tokens
before it are those of the text up to it. No token is longer than the longest one of the vocabulary,
so one of as many places before the cut is such a boundary. If the texts up to each of these places
begin with the same tokens, the whole text does.

Where nothing can be proved the whole text is tokenised.
"""

import json
import re
import unicodedata
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
# Characters behind the one that was asked for in which a safe place is waited for.
_FAR = 4096
# Heads of a text that are tokenised at a time for a proof, and how often another cut is tried.
_BATCH = 16
_CUTS = 8

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
_NOT_SPACE = re.compile(r"\S")
_SPACE = " "
_SPACE_MARK = "\u2581"  # SentencePiece's spelling of a space


def _spelled_bytes() -> list[str]:
    """The character that ByteLevel spells each byte with. Source: GPT-2's bytes_to_unicode."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@dataclass(frozen=True)
class SafeCuts:
    """Places where a text may be cut without changing the tokens before.

    pattern: matches, with no width, at each of them. longest: within so many characters two tokens
    meet; None if nobody can say. ascii_only: that holds among characters of one byte.
    """

    pattern: re.Pattern[str]
    longest: int | None
    ascii_only: bool

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
        beside = [token for token in content["added_tokens"] if not token["special"]]
        added = [token["content"] for token in beside]
        if any(re.search(rf"\S{_SPACE}", token) for token in added):
            return None
        is_byte_level = _is_byte_level(content)
        if is_byte_level:
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
        longest = None
        if not any(token[key] for token in beside for key in ("single_word", "lstrip", "rstrip")):
            longest = _longest_token(content, is_byte_level, added)
        straddles = is_byte_level and any(_STRADDLING.match(token) for token in model["vocab"])
        return cls(re.compile("|".join(places)), longest, straddles)

    def cut(self, text: str, start: int) -> str:
        """`text` up to the first safe place from character `start` on; all of it without one."""
        place = self.pattern.search(text, start)
        return text if place is None else text[: place.start()]

    def may_end(self, text: str, end: int) -> bool:
        """Whether a cut at any of the `longest` places up to `end` leaves every piece as it is.

        But for the last one, which may be the beginning of the whole text's piece. How white space
        is split is said by what follows it, and marks belong to the letter before.
        """
        assert self.longest is not None
        part = text[end - self.longest : end + 1]
        if not part.strip("\n"):
            return True  # up to the last line break in a row they are one piece
        if not part.strip(" \t"):
            behind = _NOT_SPACE.search(text, end)
            after = len(text) if behind is None else behind.start()
            return (behind is None or _is_plain(text[after])) and not _has_line_break(
                text, end, after
            )
        return _is_plain(part) and (part.isascii() or not self.ascii_only)


def _has_line_break(text: str, start: int, end: int) -> bool:
    return text.find("\n", start, end) >= 0 or text.find("\r", start, end) >= 0


def _is_plain(part: str) -> bool:
    """Whether its characters are letters, numbers or signs, none of which joins the one before."""
    kinds = {unicodedata.category(character)[0] for character in part}
    return (
        kinds <= set("LNPS")
        and not any("\u1160" <= character <= "\u11ff" for character in part)
        and unicodedata.is_normalized("NFC", part)
    )


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
                heads[i] = self._head(cuts, texts[i], _enough(_PROBE, len(probe), limit), limit)
        rows = self._ids(heads)
        # What was cut too early is cut later, by what its own head has shown.
        while early := [
            i for i, row in enumerate(rows) if len(row) <= limit and len(heads[i]) < len(texts[i])
        ]:
            assert cuts is not None
            for i in early:
                tried = len(heads[i])
                enough = max(_enough(tried, len(rows[i]), limit), tried + 1)
                heads[i] = self._head(cuts, texts[i], enough, limit)
            for i, row in zip(early, self._ids([heads[i] for i in early]), strict=True):
                rows[i] = row
        truncated = sum(len(row) > limit for row in rows)
        return [row[:limit] for row in rows], truncated

    def _head(self, cuts: SafeCuts, text: str, start: int, limit: int) -> str:
        """The beginning of a text, from character `start` on cut where its tokens stay."""
        head = cuts.cut(text, start)
        if len(head) <= start + _FAR or cuts.longest is None:
            return head
        return self._proved_head(cuts, text, start, limit) or head

    def _proved_head(self, cuts: SafeCuts, text: str, start: int, limit: int) -> str | None:
        """A beginning that has the first `limit` tokens of the text, and more; None without one."""
        assert cuts.longest is not None
        end = start + cuts.longest
        for _ in range(_CUTS):
            if end >= len(text):
                return None
            count = len(self._ids([text[:end]])[0])
            if count <= limit:
                end = max(_enough(end, count, limit), end + cuts.longest)
            elif cuts.may_end(text, end) and self._agree(
                text, range(end - cuts.longest + 1, end + 1), limit
            ):
                return text[:end]
            else:
                end += end // 8 + cuts.longest
        return None

    def _agree(self, text: str, ends: range, limit: int) -> bool:
        """Whether the text up to each end has more than `limit` tokens, the first ones alike."""
        first: np.ndarray | None = None
        for i in range(0, len(ends), _BATCH):
            for row in self._ids([text[:end] for end in ends[i : i + _BATCH]]):
                first = row[:limit] if first is None else first
                if len(row) <= limit or not np.array_equal(row[:limit], first):
                    return False
        return True

    def _ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._core.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _enough(characters: int, tokens: int, limit: int) -> int:
    """Characters that hold more than `limit` tokens, if all are as those that held `tokens`."""
    return int(_MARGIN * (limit + 1) * characters / max(tokens, 1))


# Of the characters by which ByteLevel spells bytes: those of bytes inside a character of UTF-8, and
# a token that ends one character and begins the next.
_BYTES = {ord(spelled): byte for byte, spelled in enumerate(_spelled_bytes())}
_INSIDE = "".join(chr(spelled) for spelled, byte in _BYTES.items() if 0x80 <= byte < 0xC0)
_STRADDLING = re.compile(f"[{re.escape(_INSIDE)}]+[^{re.escape(_INSIDE)}]")


def _longest_token(content: dict[str, Any], is_byte_level: bool, added: list[str]) -> int | None:
    """Within how many characters two tokens meet; None where unknown ones leave no token."""
    model = content["model"]
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        return None
    if is_byte_level:
        known = all(
            chr(spelled) in model["vocab"]
            for spelled, byte in _BYTES.items()
            if 0x20 <= byte < 0x7F or byte in b"\t\n" or 0x80 <= byte < 0xC0 or 0xC2 <= byte <= 0xF0
        )
    else:
        bytes_known = all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        known = bool(model.get("unk_token")) and not model.get("fuse_unk")
        known = known or bool(model.get("byte_fallback") and bytes_known)
    if not known:
        return None
    # A token may end inside a character, which then ends with one of the next three.
    return max(map(len, [*model["vocab"], *added])) + 4


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
