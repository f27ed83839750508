"""Word states and probes."""

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.evaluate.corpora import Synset
from gen_fast.evaluate.words import (
    TaggedWord,
    Triple,
    future_accuracy,
    probe,
    static_states,
    tagged_words,
    triples,
    word_states,
)
from gen_fast.model.batch import PackedBatch
from gen_fast.ops.norm import rms_norm


def synset(kind, words, examples=(), topic=3):
    return Synset(f"{kind}1", topic, words, "a definition", examples, ())


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return gen_fast.load(tiny_model, device="cpu", dtype="float32")


def test_words_are_found_in_their_sentences_once_and_whole():
    synsets = [
        synset("s", ("fast",), ("a breakfast, and a Fast car", "nothing here")),
        synset("r", ("fast",), ("he ran fast",)),
    ]
    first, second = tagged_words(synsets)
    assert (first.text[first.start : first.end], first.tag, first.start) == ("Fast", "a", 19)
    assert (second.word_type, second.tag) == ("fast", "r")
    assert first.held_out == second.held_out


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_a_word_is_the_mean_of_its_tokens_or_of_those_before_them(encoder, mask):
    word = TaggedWord("the cat sat", 4, 7, "n")
    bos = encoder.tokenizer.bos_token_id
    ids = [bos, *encoder.tokenizer(word.text)["input_ids"]]
    pieces = [encoder.tokenizer.decode([i]) for i in ids[1:]]
    ends = np.cumsum([len(piece) for piece in pieces])
    places = [i + 1 for i, end in enumerate(ends) if 4 < end <= 7]
    assert "".join(pieces[i - 1] for i in places).strip() == "cat"
    backbone = encoder.backbone
    with torch.inference_mode():
        stream = backbone.forward(PackedBatch.pack([np.array(ids)]), mask=mask)
        states = rms_norm(stream, backbone.final_norm, backbone.config.norm_eps)
    for shifted in (False, True):
        (found,) = word_states(encoder, [word], mask=mask, shifted=shifted)
        expected = states[[i - shifted for i in places]].mean(0).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    (static,) = static_states(encoder, [word])
    rows = backbone.embedding[[ids[i] for i in places]].mean(0).numpy()
    np.testing.assert_allclose(static, rows, rtol=1e-5)


def test_a_probe_is_tested_on_word_types_that_it_has_not_seen():
    words = [TaggedWord(f"w{i}", 0, len(f"w{i}"), "nv"[i % 2]) for i in range(200)]
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 8))
    told = noise + np.array([[3.0 * (i % 2)] * 8 for i in range(200)])
    assert probe(told, words) > 0.95
    assert probe(noise, words) < 0.7
    assert 60 < sum(word.held_out for word in words) < 140


def test_a_prefix_hears_of_its_end_only_without_a_causal_mask(encoder):
    items = [Triple("the", "the cat", "the cat", "the dog"), Triple("a", "a hat", "a mat", "a hat")]
    assert future_accuracy(encoder, items, mask="causal") == 0.5
    assert future_accuracy(encoder, items, mask="bidirectional") == 0.5  # one right, one wrong
    assert future_accuracy(encoder, items[:1], mask="bidirectional") == 1.0


def test_triples_share_their_beginning_and_differ_in_topic():
    synsets = [
        synset("n", ("car", "automobile"), topic=6),
        synset("n", ("joy",), topic=12),
        synset("v", ("go", "move")),
    ]
    (triple,) = triples(synsets, 5)
    assert triple.sentence.removeprefix(triple.prefix) == " car."
    assert triple.same.removeprefix(triple.prefix) == " automobile."
    assert triple.other.removeprefix(triple.prefix) == " joy."
