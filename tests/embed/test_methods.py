"""The training-free methods, each against its definition written out with transformers."""

import threading

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.embed.layouts import ECHO_FIRST, ECHO_SECOND
from gen_fast.embed.loading import identify, load_generator
from gen_fast.model.generation import Answer, AnswerGenerator
from gen_fast.model.sampling import Sampling
from gen_fast.testing import relative_error

PROMPT = "Say: "
TEXT = "the cat in a hat"


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import AutoModel

    return AutoModel.from_pretrained(tiny_model).eval()


def states(model, encoder, text):
    ids = encoder.tokenizer(text).input_ids
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def n_tokens(encoder, text):
    return len(encoder.tokenizer(text).input_ids)


@pytest.mark.parametrize("method", ["mean", "weighted-mean", "last-token"])
def test_pooling_over_own_tokens(model, tiny_model, method):
    encoder = gen_fast.load(tiny_model, method=method, dtype="float32", device="cpu")
    own = states(model, encoder, PROMPT + TEXT)[n_tokens(encoder, "Say:") :]
    weights = {
        "mean": torch.ones(len(own)),
        "weighted-mean": torch.arange(1.0, len(own) + 1),
        "last-token": torch.eye(len(own))[-1],
    }[method]
    # "Say: " ends in a space that merges with "the": the own tokens start after the colon.
    expected = (own * weights.unsqueeze(1)).sum(0) / weights.sum()
    actual = encoder.encode([TEXT, "the other text"], prompt=PROMPT)[0]
    assert relative_error(torch.from_numpy(actual), expected) <= 1e-4


def test_echo_pools_the_second_copy(model, tiny_model):
    encoder = gen_fast.load(tiny_model, method="echo", dtype="float32", device="cpu")
    full = states(model, encoder, ECHO_FIRST + TEXT + ECHO_SECOND + TEXT)
    second = n_tokens(encoder, (ECHO_SECOND + TEXT)) - n_tokens(encoder, ECHO_SECOND.rstrip())
    actual = encoder.encode(TEXT)
    assert relative_error(torch.from_numpy(actual), full[-second:].mean(0)) <= 1e-4


def test_echo_truncates_both_copies_alike(tiny_model):
    encoder = gen_fast.load(tiny_model, method="echo", dtype="float32", device="cpu", max_length=64)
    rows = encoder._layout("")(["x" * 500, "the cat"], 0)
    assert len(rows.ids[0]) == 64
    assert rows.needed[0] > 5
    assert np.isfinite(encoder.encode(["x" * 500, "the cat"])).all()


def hyde(model, **options):
    settings = options.pop("settings", gen_fast.HyDESettings(answers=3, max_new_tokens=16))
    return gen_fast.load(
        model, method="hyde", dtype="float32", device="cpu", hyde=settings, **options
    )


def test_hyde_with_the_likeliest_answer(tiny_model):
    from transformers import AutoModelForCausalLM

    encoder = hyde(tiny_model, settings=gen_fast.HyDESettings(answers=1, temperature=0))
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    chat = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT + TEXT}], tokenize=False, add_generation_prompt=True
    )
    ids = encoder.tokenizer(chat, return_tensors="pt").input_ids
    out = model.generate(
        ids, max_new_tokens=128, min_new_tokens=1, do_sample=False, eos_token_id=2, pad_token_id=2
    )
    answer = encoder.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    mean = gen_fast.load(tiny_model, method="mean", dtype="float32", device="cpu")
    expected = torch.from_numpy(mean.encode([answer, TEXT]).mean(0))
    actual = encoder.encode([TEXT, "a longer text of another length"], prompt=PROMPT)[0]
    assert relative_error(torch.from_numpy(actual), expected) <= 1e-3


def test_hyde_is_the_mean_over_answers_and_the_query(tiny_model):
    settings = gen_fast.HyDESettings(answers=5, max_new_tokens=9, temperature=1.3, seed=4)
    texts = [TEXT, "b", "another, longer text of another length"]
    actual = hyde(tiny_model, settings=settings).encode_query(texts, prompt=PROMPT)
    mean = gen_fast.load(tiny_model, method="mean", dtype="float32", device="cpu")
    writer = load_generator(
        tiny_model,
        device="cpu",
        dtype="float32",
        max_new_tokens=9,
        sampling=Sampling(1.3, seed=4),
    )
    for text, vector in zip(texts, actual, strict=True):
        answers = [answer.text for answer in writer.answers([PROMPT + text], 5)]
        assert len(set(answers)) > 1
        expected = mean.encode([text, *filter(None, answers)]).mean(0)
        assert relative_error(torch.from_numpy(vector), torch.from_numpy(expected)) <= 1e-5
    other = gen_fast.HyDESettings(answers=5, max_new_tokens=9, temperature=1.3, seed=5)
    assert not np.allclose(hyde(tiny_model, settings=other).encode(texts, prompt=PROMPT), actual)


def test_hyde_of_a_text_does_not_depend_on_its_neighbours(tiny_model):
    texts = ["a longer text about the cat", TEXT, "b", TEXT]
    together = hyde(tiny_model).encode_query(texts, normalize_embeddings=True, truncate_dim=20)
    alone = [
        hyde(tiny_model).encode_query(t, normalize_embeddings=True, truncate_dim=20) for t in texts
    ]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    exact = hyde(tiny_model, deterministic=True)
    np.testing.assert_array_equal(exact.encode(texts), [exact.encode(text) for text in texts])
    assert exact.encode([]).shape == (0, 48)


def test_an_answer_without_a_token_is_left_out(tiny_model, monkeypatch):
    encoder = hyde(tiny_model)
    monkeypatch.setattr(AnswerGenerator, "batch", lambda _, texts, numbers: [
        Answer("" if i else f"about {text}", "stop") for text, i in zip(texts, numbers, strict=True)
    ])  # fmt: skip
    mean = gen_fast.load(tiny_model, method="mean", dtype="float32", device="cpu")
    expected = [mean.encode([text, f"about {text}"]).mean(0) for text in ("a cat", "b")]
    np.testing.assert_allclose(encoder.encode(["a cat", "b"]), expected, atol=1e-5)
    with pytest.raises(gen_fast.TextError, match="row 1 has no token"):
        encoder.encode(["a", ""])


@pytest.mark.parametrize(("settings", "message"), [
    ({"answers": 0}, "at least 1"),
    ({"max_new_tokens": 0}, "at least 1"),
    ({"temperature": -1}, "at least 0"),
    ({"temperature": 0}, "8 answers at temperature 0 are all the same"),
])  # fmt: skip
def test_hyde_that_makes_no_sense(settings, message):
    with pytest.raises(gen_fast.ConfigError, match=message):
        gen_fast.HyDESettings(**settings)


def test_how_hyde_answers_belongs_to_what_is_embedded(tiny_model):
    with pytest.raises(gen_fast.ConfigError, match="no meaning with method 'echo'"):
        gen_fast.load(tiny_model, method="echo", hyde=gen_fast.HyDESettings())
    assert identify(tiny_model, method="hyde")["hyde"] == {
        "answers": 8, "max_new_tokens": 128, "temperature": 0.7, "seed": 0
    }  # fmt: skip


def test_hyde_does_not_answer_documents(tiny_model):
    encoder = hyde(tiny_model)
    mean = gen_fast.load(tiny_model, method="mean", dtype="float32", device="cpu")
    for prompt in (None, PROMPT):
        documents = encoder.encode_document([TEXT, "b"], prompt=prompt)
        np.testing.assert_array_equal(documents, mean.encode([TEXT, "b"], prompt=prompt))
    assert not np.allclose(encoder.encode_query([TEXT, "b"]), mean.encode([TEXT, "b"]))


def test_hyde_runs_the_model_in_one_thread(tiny_model, monkeypatch):
    encoder = hyde(tiny_model)
    threads = set()
    forward = encoder.backbone.forward

    def watched(*arguments, **options):
        threads.add(threading.get_ident())
        return forward(*arguments, **options)

    monkeypatch.setattr(encoder.backbone, "forward", watched)
    encoder.encode_query([TEXT, "another"])
    assert threads == {threading.get_ident()}


def test_unknown_method(tiny_model):
    with pytest.raises(gen_fast.UnsupportedModelError, match="median"):
        gen_fast.load(tiny_model, method="median")
