# ruff: noqa: RUF001 - other scripts are what they are trained on
"""Tokenizers of the kinds that models have, trained on fragments of many scripts."""

import json
import random

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from gen_fast.model.truncation import LLAMA3_PIECES, QWEN2_PIECES

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_end|>"]
THOUGHTS = ["<think>", "</think>", "two.parts", "line\nbreak", "  "]
FRAGMENTS = [
    "the",
    "Cat",
    "I'm",
    "don't",
    "x",
    "aaaa",
    "übermäßig",
    "naïve",
    "e\u0301t\u0301e",
    "İ",
    "ﬁ",
    "123",
    "4",
    "٣٤",
    "Ⅷ",
    "½",
    "²",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\n\n  \n",
    " \n ",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\x1c",
    ".",
    ",",
    "...",
    "!?",
    "'",
    "'s",
    "'S",
    '"',
    "(",
    ")",
    "{};",
    "//",
    "_",
    "-",
    "<",
    ">",
    "他们在北京",
    "，",
    "。",
    "東京タワー",
    "「",
    "」",
    "ﾊﾝ",
    "한국어",
    "สวัสดี",
    "हिन्दी",
    "عربي",
    "עברית",
    "ελ",
    "😀",
    "👩‍👩‍👧",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u2581",
    "\u2581\u2581",
    "\u0338",
    "\u0000",
    "𝔘",
    "<|im_end|>",
    "<think>",
    "</think>",
    "two.parts",
    "line\nbreak",
    "</s>",
    "▁the",
]


def text_of(rng: random.Random, fragments: int) -> str:
    """Fragments in any order; some alone, some repeated."""
    chosen = rng.choices(FRAGMENTS, k=rng.randint(1, fragments))
    return "".join(piece * rng.choice((1, 1, 1, 2, 5)) for piece in chosen)


def trained(model, normalizer=None, pieces=None, **options) -> Tokenizer:
    """A tokenizer with merges of its own, learned from the fragments."""
    rng = random.Random(1)
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pieces is not None:
        tokenizer.pre_tokenizer = pieces
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, show_progress=False, **options
    )
    tokenizer.train_from_iterator((text_of(rng, 30) for _ in range(300)), trainer)
    return tokenizer


def byte_level(pattern=None, normalizer=None, before=()) -> Tokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    steps = list(before)
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    pieces = pre_tokenizers.Sequence([*steps, last]) if steps else last
    return trained(
        models.BPE(), normalizer, pieces, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )


def sentencepiece(metaspace: bool, all_bytes: bool = False) -> Tokenizer:
    """Llama 2's and Mistral's kind: one piece, spaces as marks at the beginning of tokens.

    all_bytes: as theirs, it has a token for each byte of an unknown character.
    """
    learned = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True), pieces=pre_tokenizers.Metaspace()
    )
    content = json.loads(learned.to_str())
    content["model"]["byte_fallback"] = True
    vocabulary = content["model"]["vocab"]
    if all_bytes:
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
        content = json.loads(tokenizer.to_str())
        content["pre_tokenizer"] = None
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    return tokenizer


def with_thoughts() -> Tokenizer:
    """Qwen3's kind: tokens that are not special stand beside the vocabulary."""
    tokenizer = byte_level(QWEN2_PIECES, normalizers.NFC())
    tokenizer.add_tokens(THOUGHTS)
    return tokenizer


KINDS = {
    "gpt2": lambda: byte_level(),
    "smollm": lambda: byte_level(before=[pre_tokenizers.Digits(individual_digits=True)]),
    "qwen2": lambda: byte_level(QWEN2_PIECES, normalizers.NFC()),
    "qwen3": with_thoughts,
    "llama3": lambda: byte_level(LLAMA3_PIECES),
    "metaspace": lambda: sentencepiece(True),
    "sentencepiece": lambda: sentencepiece(False),
    "llama2": lambda: sentencepiece(False, all_bytes=True),
}
