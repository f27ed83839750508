"""Decoding over our own weights and KV cache, against transformers' generate()."""

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.model.batch import PackedBatch
from gen_fast.model.decoding import Decoder
from gen_fast.model.generation import AnswerGenerator, end_token_ids
from gen_fast.model.sampling import Sampling
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.testing import FAMILY_OPTIONS, relative_error, save_tiny_model

PROMPTS = [np.array(ids) for ids in ([5], [9, 40, 7, 7, 100, 3], list(range(30, 60)), [8, 200])]


@pytest.fixture(scope="module", params=list(FAMILY_OPTIONS))
def family(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param.replace("/", "-"))
    model = save_tiny_model(directory, request.param)
    backbone = load_backbone(directory)
    return model, backbone, load_head(directory, backbone)


def transformers_greedy(model, end, new_tokens, **inputs):
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=end, pad_token_id=0
        )
    ids = out[0, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else out[0]
    ids = ids.tolist()
    return ids[: ids.index(end)] if end in ids else ids


def test_greedy_decoding_equals_transformers(family):
    model, backbone, head = family
    # An end token that comes up: what the third prompt's third token is.
    free = transformers_greedy(model, 1, 12, input_ids=torch.from_numpy(PROMPTS[2])[None])
    end = free[2]
    decoded = Decoder(backbone, head, [end]).decode(PROMPTS, 12)
    for prompt, (ids, reason) in zip(PROMPTS, decoded, strict=True):
        expected = transformers_greedy(model, end, 12, input_ids=torch.from_numpy(prompt)[None])
        assert ids.tolist() == expected
        assert reason == ("length" if len(expected) == 12 else "stop")
    assert decoded[2][1] == "stop"


def test_decoding_behind_a_shared_prefix_and_packed_weights(family):
    model, backbone, head = family
    shared = (4, 9, 77)
    joined = [torch.from_numpy(np.concatenate((shared, ids)))[None] for ids in PROMPTS]
    expected = [transformers_greedy(model, 1, 6, input_ids=ids) for ids in joined]
    decoded = Decoder(backbone, head, [1]).decode(PROMPTS, 6, prefix=backbone.prefill(shared))
    assert [ids.tolist() for ids, _ in decoded] == expected


def test_decoding_from_soft_prompts(family):
    model, backbone, head = family
    torch.manual_seed(0)
    soft = torch.randn(5, backbone.config.hidden_size)
    vocabulary = backbone.config.vocab_size
    # Two texts, of two and three soft prompts.
    rows = [np.arange(vocabulary, vocabulary + 2), np.arange(vocabulary + 2, vocabulary + 5)]
    decoded = Decoder(backbone, head, [1]).decode(rows, 8, special=soft)
    for part, (ids, _) in zip((soft[:2], soft[2:]), decoded, strict=True):
        mask = torch.ones(1, len(part), dtype=torch.int64)
        expected = transformers_greedy(model, 1, 8, inputs_embeds=part[None], attention_mask=mask)
        assert ids.tolist() == expected


def test_a_cache_continues_where_it_was_left(family):
    _, backbone, _ = family
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, backbone.config.vocab_size, n) for n in (1, 9, 30)]
    whole = backbone.forward(PackedBatch.pack(texts))
    cache = backbone.new_cache([len(ids) + 3 for ids in texts])  # room that stays unused
    first = [ids[: len(ids) // 2] for ids in texts]
    backbone.forward(PackedBatch.pack(first, needed=[0] * 3), cache=cache)
    rest = [ids[len(ids) // 2 :] for ids in texts]
    actual = backbone.forward(PackedBatch.pack(rest, prefix_length=cache.lengths), cache=cache)
    ends = np.cumsum([len(ids) for ids in texts])
    expected = [whole[end - len(ids) : end] for end, ids in zip(ends, rest, strict=True)]
    assert relative_error(actual, torch.cat(expected)) <= 1e-5
    with pytest.raises(ValueError, match="room"):
        backbone.forward(PackedBatch.pack([np.arange(9)] * 3), cache=cache)


def generator(directory, **options):
    backbone = load_backbone(directory, packed=True)
    return AnswerGenerator(backbone, directory, load_tokenizer(directory), **options)


def test_draws_repeat_and_differ(tiny_model):
    def drawn(seed, numbers=None, **options):
        made = generator(
            tiny_model, max_new_tokens=10, sampling=Sampling(1.0, seed=seed, **options)
        )
        return made.batch(["a", "the other"], numbers)

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, [1, 1])
    greedy = generator(tiny_model, max_new_tokens=10)
    # The likeliest token alone reaches a tiny top_p.
    assert drawn(0, top_p=1e-6) == greedy.batch(["a", "the other"])
    assert drawn(0, top_k=1) == greedy.batch(["a", "the other"])


def test_what_is_drawn_for_a_question_does_not_depend_on_the_others(tiny_model):
    questions = ["a longer question about the cat", "a", "the hat", "a"]
    made = generator(tiny_model, max_new_tokens=8, batch_size=3, sampling=Sampling(1.0))
    together = made.answers(questions, 2)
    assert together == [answer for q in questions for answer in made.answers([q], 2)]
    assert together[:2] != together[2:4]
    assert together[0] != together[1]
    assert made.own_queries(3)[1:] == made.own_queries(2, 1)


def test_the_model_s_own_sampling_is_taken_unless_another_is_given(tmp_path):
    save_tiny_model(tmp_path, "llama")
    (tmp_path / "generation_config.json").write_text('{"do_sample": true, "top_k": 3}')
    assert generator(tmp_path).sampling == Sampling(1.0, 1.0, 3)
    assert generator(tmp_path).settings["top_k"] == 3
    assert generator(tmp_path, sampling=Sampling()).sampling == Sampling()


def test_own_queries_begin_where_a_user_speaks(tiny_model):
    made = generator(tiny_model, max_new_tokens=10)
    queries = made.own_queries(5)
    assert len({query.text for query in queries}) > 1
    made._tokenizer.transformers.chat_template = None
    with pytest.raises(gen_fast.UnsupportedModelError, match="chat template"):
        made.own_queries(1)


def test_end_tokens_of_the_generation_config_count(tiny_model, tmp_path):
    tokenizer = load_tokenizer(tiny_model)
    assert end_token_ids(tmp_path, tokenizer.eos_token_id) == [tokenizer.eos_token_id]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_token_ids(tmp_path, tokenizer.eos_token_id) == [tokenizer.eos_token_id, 7, 9]


def test_answers_keep_their_order(tiny_model):
    questions = ["a longer question about the cat", "a", "the hat", "a cat in the hat and more"]
    together = generator(tiny_model, max_new_tokens=8, batch_size=2).answers(questions)
    alone = [generator(tiny_model, max_new_tokens=8).answers([q])[0] for q in questions]
    assert together == alone
