"""The training-free methods, each against its definition written out with transformers."""

import threading

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.embed.layouts import ECHO_FIRST, ECHO_SECOND
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


def test_hyde_embeds_the_greedy_answer(tiny_model):
    from transformers import AutoModelForCausalLM

    encoder = gen_fast.load(tiny_model, method="hyde", dtype="float32", device="cpu")
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
    expected = torch.from_numpy(mean.encode(answer))
    actual = encoder.encode([TEXT, "a longer text of another length"], prompt=PROMPT)[0]
    assert relative_error(torch.from_numpy(actual), expected) <= 1e-3


def test_hyde_does_not_answer_documents(tiny_model):
    encoder = gen_fast.load(tiny_model, method="hyde", dtype="float32", device="cpu")
    mean = gen_fast.load(tiny_model, method="mean", dtype="float32", device="cpu")
    for prompt in (None, PROMPT):
        documents = encoder.encode_document([TEXT, "b"], prompt=prompt)
        np.testing.assert_array_equal(documents, mean.encode([TEXT, "b"], prompt=prompt))
    assert not np.allclose(encoder.encode_query([TEXT, "b"]), mean.encode([TEXT, "b"]))


def test_hyde_runs_the_model_in_one_thread(tiny_model, monkeypatch):
    encoder = gen_fast.load(tiny_model, method="hyde", dtype="float32", device="cpu")
    threads = set()
    forward = encoder.backbone._run

    def watched(*arguments, **options):
        threads.add(threading.get_ident())
        return forward(*arguments, **options)

    monkeypatch.setattr(encoder.backbone, "_run", watched)
    encoder.encode_query([TEXT, "another"])
    assert threads == {threading.get_ident()}


def test_unknown_method(tiny_model):
    with pytest.raises(gen_fast.UnsupportedModelError, match="median"):
        gen_fast.load(tiny_model, method="median")
