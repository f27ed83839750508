# ruff: noqa: RUF001 - other scripts are what is tested
"""Token ids: those of transformers, special tokens aside, and of a whole text though it is cut."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from trained_tokenizers import KINDS, SPECIAL, THOUGHTS, byte_level, text_of, trained
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gen_fast.errors import WeightsError
from gen_fast.model import tokenizing, truncation
from gen_fast.model.tokenizing import TextTokenizer, load_tokenizer
from gen_fast.model.truncation import LeadingTokens, SafeCuts
from gen_fast.testing import edit_config, save_tiny_model


@pytest.fixture(scope="module", params=KINDS)
def core(request):
    tokenizer = KINDS[request.param]()
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture
def eager(monkeypatch):
    """Cut texts of a few characters as if they were long."""
    monkeypatch.setattr(truncation, "_SHORT", 4)
    monkeypatch.setattr(truncation, "_SHORT_PER_TOKEN", 0)
    monkeypatch.setattr(truncation, "_PROBE", 3)
    monkeypatch.setattr(truncation, "_MARGIN", 0.5)


def check_against_whole(core, cases, seed):
    rng = random.Random(seed)
    leading, cuts = LeadingTokens(core), SafeCuts.of(core)
    cut = 0
    for _ in range(cases):
        texts = [text_of(rng, 12) for _ in range(5)]
        limit = rng.randint(1, 30)
        rows, truncated = leading(texts, limit)
        whole = [row.ids for row in core.encode_batch_fast(texts, add_special_tokens=False)]
        for text, row, ids in zip(texts, rows, whole, strict=True):
            assert row.tolist() == ids[:limit], repr(text)
        assert truncated == sum(len(ids) > limit for ids in whole)
        cut += len(cuts.cut(texts[0], 3)) < len(texts[0])
    return cut


# 7 kinds of 340 calls of 5 texts: 11,900 cases; and many more.
@pytest.mark.parametrize(
    ("cases", "seed"),
    [(340, 0), *(pytest.param(2000, 100 + i, marks=pytest.mark.slow) for i in range(10))],
)
def test_a_cut_text_has_the_first_tokens_of_the_whole(core, eager, cases, seed):
    assert check_against_whole(core, cases, seed) > 50


def test_a_cut_text_has_the_first_tokens_of_the_whole_in_smollm2(smollm2, eager):
    assert check_against_whole(load_tokenizer(smollm2).core, 400, seed=2) > 100


@pytest.mark.parametrize(
    "tokenizer",
    [
        trained(models.BPE(unk_token="<unk>")),  # merges reach across spaces
        byte_level(r"\w+ \w+|."),  # pieces that nobody has looked at
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ],
    ids=["spaces inside tokens", "unknown pieces", "another model"],
)
def test_nothing_is_cut_where_nothing_is_proved(tokenizer, eager):
    assert SafeCuts.of(tokenizer) is None
    rows, _ = LeadingTokens(tokenizer)(["the cat sat on the mat"], 3)
    assert rows[0].tolist() == tokenizer.encode("the cat sat on the mat").ids[:3]


def test_an_added_token_with_a_space_inside_is_not_cut():
    tokenizer = byte_level()
    tokenizer.add_tokens(["two words"])
    assert SafeCuts.of(tokenizer) is None


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, core):
        self.core, self.characters = core, 0

    def to_str(self):
        return self.core.to_str()

    def encode_batch_fast(self, texts, **options):
        self.characters += sum(map(len, texts))
        return self.core.encode_batch_fast(texts, **options)


@pytest.mark.parametrize(
    "sample", ["The cat sat on the mat, twice. ", "他们在北京，我们在东京。", "x=f(y);"]
)
def test_a_megabyte_costs_what_its_first_tokens_do(smollm2, sample):
    core = load_tokenizer(smollm2).core
    text = sample * (1_000_000 // len(sample.encode()))
    counting = Counting(core)
    rows, truncated = LeadingTokens(counting)([text], 512)
    assert (len(rows[0]), truncated) == (512, 1)
    offsets = core.encode(text[:20_000], add_special_tokens=False).offsets
    needed = offsets[511][1]
    assert counting.characters <= 2 * needed


# ---------------------------------------------------------------- special tokens around a text


def around(directory, *, before=(), after=()):
    """A tiny model whose tokenizer puts special tokens around a text."""
    save_tiny_model(directory, "llama")
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    names = [*before, *after]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    tokenizer.save(str(path))
    return load_tokenizer(directory)


@pytest.mark.parametrize("before", [(), ("<|im_start|>",)])
@pytest.mark.parametrize("after", [(), ("<|im_end|>",)])
def test_truncation_is_that_of_hugging_face(before, after, tmp_path):
    tokenizer = around(tmp_path, before=before, after=after)
    texts = ["", "a", "the cat sat", "the cat sat on the mat in the hat " * 9]
    for prompt in ("", "say:"):
        ours = TextTokenizer(tokenizer, prompt, 16)
        rows, shared = ours(texts)
        theirs = tokenizer.transformers(
            [prompt + text for text in texts], truncation=True, max_length=16
        ).input_ids
        assert [row.tolist() for row in rows] == theirs
        assert ours.truncated == 1
        assert shared.tolist() == [len(before) + len(prompt)] * 4
    if after:
        assert rows[-1][-1] == tokenizer.backend.token_to_id("<|im_end|>")


# ---------------------------------------------------------------- the ids of AutoTokenizer


def saved_tokenizer(directory, core, name, model_type="llama", **settings):
    """A model directory with this tokenizer.json and a tokenizer_config.json of that class."""
    save_tiny_model(directory, "llama")
    edit_config(directory, model_type=model_type)
    core.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": name, "eos_token": "</s>", "unk_token": "<unk>", **settings}
    values = {key: value for key, value in values.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def check_against_transformers(directory):
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    rng = random.Random(3)
    texts = [text_of(rng, 12) for _ in range(200)]
    for text in texts:
        ids = ours.ids(text, add_special_tokens=True).tolist()
        assert ids == theirs(text).input_ids, repr(text)
    core = theirs.backend_tokenizer
    core.encode_special_tokens = True
    for text in texts:
        assert ours.core.encode(text).ids == core.encode(text).ids, repr(text)
    assert ours.eos_token_id == theirs.eos_token_id
    return ours


def added(content, **attributes):
    """An entry of a tokenizer_config.json's added_tokens_decoder."""
    plain = dict.fromkeys(("special", "lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **plain, **attributes}


DIRECT = [
    ("llama3", "PreTrainedTokenizerFast", "llama", {}),
    ("llama3", "LlamaTokenizerFast", "llama", {}),
    ("llama3", "TokenizersBackend", "qwen3", {}),
    ("sentencepiece", "LlamaTokenizer", "mistral", {"add_bos_token": True}),
    ("qwen2", "Qwen2TokenizerFast", "qwen2", {}),
    ("qwen2", "Qwen2Tokenizer", "qwen3", {"add_bos_token": False}),
    ("qwen2", "PreTrainedTokenizerFast", "qwen2", {}),
    (
        "qwen3",
        "Qwen2Tokenizer",
        "qwen3",
        {
            "added_tokens_decoder": {
                **{str(i): added(token, special=True) for i, token in enumerate(SPECIAL)},
                **{str(900 + i): added(t, normalized=True) for i, t in enumerate(THOUGHTS)},
            }
        },
    ),
    ("qwen3", "TokenizersBackend", "qwen3", {}),
]
REBUILT = [
    ("qwen2", "Qwen2Tokenizer", "qwen2", {"add_prefix_space": True}),
    ("qwen2", "Qwen2Tokenizer", "qwen2", {"eos_token": None}),
    ("qwen3", "Qwen2Tokenizer", "qwen3", {}),
    ("sentencepiece", "LlamaTokenizer", "llama", {}),
    ("smollm", "GPT2Tokenizer", "llama", {}),
    ("gpt2", "PreTrainedTokenizerFast", "qwen2", {}),
    ("llama3", "PreTrainedTokenizerFast", "llama", {"pad_token": "<pad>"}),
    (
        "llama3",
        "PreTrainedTokenizerFast",
        "llama",
        {"added_tokens_decoder": {"7": added("the", lstrip=True)}},
    ),
]


@pytest.mark.parametrize(("kind", "name", "family", "settings"), DIRECT + REBUILT)
def test_ids_are_those_of_transformers(kind, name, family, settings, tmp_path, monkeypatch):
    saved_tokenizer(tmp_path, KINDS[kind](), name, family, **settings)
    check_against_transformers(tmp_path)
    asked = []
    original = tokenizing._auto_tokenizer
    monkeypatch.setattr(tokenizing, "_auto_tokenizer", lambda d: asked.append(d) or original(d))
    load_tokenizer(tmp_path)
    assert bool(asked) == ((kind, name, family, settings) in REBUILT)


@pytest.mark.parametrize(
    ("file", "content"),
    [("special_tokens_map.json", {"eos_token": "</s>"}), ("added_tokens.json", {"<new>": 900})],
)
def test_tokens_of_older_files_count_as_in_transformers(file, content, tmp_path):
    saved_tokenizer(tmp_path, KINDS["llama3"](), "PreTrainedTokenizerFast", eos_token=None)
    (tmp_path / file).write_text(json.dumps(content))
    check_against_transformers(tmp_path)


@pytest.mark.parametrize(
    "content", [{"model": None}, {"added_tokens": None}, {"added_tokens": [1]}]
)
def test_json_that_is_no_tokenizer_is_named(content, tmp_path):
    saved_tokenizer(tmp_path, KINDS["llama3"](), "PreTrainedTokenizerFast")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(WeightsError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def test_ids_of_smollm2_are_those_of_transformers(smollm2):
    check_against_transformers(smollm2)


def test_a_tokenizer_saved_by_transformers(tmp_path):
    save_tiny_model(tmp_path, "llama")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=KINDS["llama3"](), eos_token="</s>", additional_special_tokens=["<new>"]
    )
    fast.backend_tokenizer.decoder = decoders.ByteLevel()
    fast.save_pretrained(tmp_path)
    ours = check_against_transformers(tmp_path)
    ids = ours.ids("the cat</s>", add_special_tokens=False)
    assert ours.decode(ids) == "the cat"
    assert np.array_equal(ids, ours.transformers("the cat</s>").input_ids)


# ---------------------------------------------------------------- texts without a place to cut


UNBROKEN = [
    "x",
    "ab",
    "aaaabaaab",
    "the",
    "aGVsbG8gd29ybGQ9",
    "deadbeef0123",
    "1234567890",
    "0.1,",
    "=",
    "=-",
    "'s'll",
    "他们在北京",
    "東京タワー",
    "สวัสดี",
    "naïveübermäßig",
    "e\u0301",
    "한국어",
    "\u1112\u1161\u11ab",
    "\u212b\u2126",
    "\u0958",
    "😀",
    "👩‍👩‍👧",
    "<think>",
    "</think",
    "</s>",
    "two.parts",
    " ",
    "\n",
    " \n",
    "x \n",
    "\u2581",
    "\u0000",
    "𝔘",
    "ﬁ",
    "ελ",
]


@pytest.fixture
def eager_proofs(monkeypatch, eager):
    """Prove at once, and never wait for a safe place."""
    monkeypatch.setattr(truncation, "_FAR", 0)


def unbroken_text(rng: random.Random) -> str:
    """One fragment, or a mixture of two, over and over, with something before and behind it."""
    pair = rng.choices(UNBROKEN, k=rng.choice((1, 1, 2)))
    run = "".join(rng.choice(pair) for _ in range(rng.randint(20, 200)))
    return text_of(rng, 3) + run + text_of(rng, 3)


def check_unbroken(core, cases, seed):
    """How many heads were proved; each of them begins with the tokens of the whole."""
    rng = random.Random(seed)
    leading, proved = LeadingTokens(core), 0

    def counted(*arguments):
        nonlocal proved
        head = LeadingTokens._proved_head(leading, *arguments)
        proved += head is not None
        return head

    leading._proved_head = counted
    for _ in range(cases):
        text, limit = unbroken_text(rng), rng.randint(1, 40)
        rows, truncated = leading([text], limit)
        ids = core.encode(text, add_special_tokens=False).ids
        assert rows[0].tolist() == ids[:limit], (text, limit)
        assert truncated == (len(ids) > limit)
    return proved


@pytest.mark.parametrize(
    ("cases", "seed"),
    [(200, 5), *(pytest.param(3000, 200 + i, marks=pytest.mark.slow) for i in range(10))],
)
def test_an_unbroken_text_has_the_first_tokens_of_the_whole(core, eager_proofs, cases, seed):
    proved = check_unbroken(core, cases, seed)
    # Of the trained tokenizers of SentencePiece's kind unknown characters are one token.
    assert proved > 25 or SafeCuts.of(core).longest is None


def test_an_unbroken_text_has_the_first_tokens_of_the_whole_in_smollm2(smollm2, eager_proofs):
    assert check_unbroken(load_tokenizer(smollm2).core, 150, seed=6) > 10


def test_merges_that_depend_on_what_follows_are_not_proved(eager_proofs):
    """A chain of merges: whether the first two letters are one token is said by the last one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [(letters[i], letters[i + 1]) for i in reversed(range(25))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    leading = LeadingTokens(tokenizer)
    for end in range(2, 27):
        text = letters[:end] + letters[1:]
        for limit in (1, 5, 12):
            ids = tokenizer.encode(text).ids
            assert leading([text], limit)[0][0].tolist() == ids[:limit]


@pytest.mark.parametrize(
    "sample", ["x", "他们在北京", "1234567890", "=-", "aGVsbG8gd29ybGQ9", " ", "\n"]
)
def test_a_text_without_a_place_to_cut_is_not_tokenised_whole(smollm2, sample):
    counting = Counting(load_tokenizer(smollm2).core)
    text = sample * (300_000 // len(sample))
    whole = counting.core.encode(text, add_special_tokens=False).ids
    longest = 0
    encode = counting.encode_batch_fast

    def bounded(texts, **options):
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return encode(texts, **options)

    counting.encode_batch_fast = bounded
    rows, truncated = LeadingTokens(counting)([text], 512)
    assert rows[0].tolist() == whole[:512]
    assert truncated == 1
    assert longest < 60_000
