"""LLM2Vec against the reference package, on checkpoints that it and PEFT have written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import llm2vec as oracle

import gen_fast
from gen_fast.embed.loading import identify
from gen_fast.formats.llm2vec import Settings, write_settings

INSTRUCTION = " Retrieve what answers this question:  "
TEXTS = [
    "the cat in a hat",
    " a thing,  inside the other \n",
    "ein Bär: 熊が the ice",
    "one word after another, and the next. " * 12,
    "a",
]
# Of two families the base has a chat wrapper, once of plain text and once of special tokens.
CHECKPOINTS = {
    "llama-chat": ("llama", True, "mistralai/Mistral-7B-Instruct-v0.2"),
    "llama3-chat": ("llama", True, "meta-llama/Meta-Llama-3-8B-Instruct"),
    "qwen2-chat": ("qwen2", False, "Qwen/Qwen2-7B-Instruct"),
    "mistral": ("mistral", True, "mistralai/Mistral-7B-v0.1"),
    "llama": ("llama", False, "princeton-nlp/Sheared-LLaMA-1.3B"),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory) -> Path:
    """x-mntp-unsup-simcse beside x-mntp, in the published layout, and their base."""
    family, begin, name = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp("llm2vec")
    oracle.save_base(folder / "base", family, begin=begin)
    oracle.save_mntp(folder / "base", folder / "x-mntp", name)
    oracle.save_over(folder / "x-mntp", folder / "x-mntp-unsup-simcse")
    return folder / "x-mntp-unsup-simcse"


def load(directory: Path, **options) -> gen_fast.Encoder:
    return gen_fast.load(directory, dtype="float32", device="cpu", **options)


def assert_equal(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("settings", [
    Settings(max_length=120, doc_max_length=60),
    Settings("weighted_mean", 120, 60),
    Settings("eos_token", 120, 60),
    Settings("last_token", 120, 60),
    Settings("mean", 120, 300),
    Settings("weighted_mean", 120, 60, skip_instruction=False),
], ids=str)  # fmt: skip
def test_embeddings_equal_the_reference_package(checkpoint, settings):
    write_settings(checkpoint, settings)
    encoder = load(checkpoint)
    assert (encoder.method, encoder.max_length) == ("llm2vec", 120)
    mntp = checkpoint.parent / "x-mntp"
    prompts = ("", INSTRUCTION)
    pairs = [[prompt, text] for prompt in prompts for text in TEXTS]
    expected = np.split(oracle.embed(checkpoint, mntp, pairs), len(prompts))
    for prompt, vectors in zip(prompts, expected, strict=True):
        assert_equal(encoder.encode(TEXTS, prompt=prompt), vectors)


def test_an_mntp_checkpoint_and_merged_weights(checkpoint, tmp_path):
    mntp = checkpoint.parent / "x-mntp"
    pairs = [["", text] for text in TEXTS]
    assert_equal(load(mntp).encode(TEXTS), oracle.embed(mntp, None, pairs))
    oracle.save_over(mntp, tmp_path, merge=True)
    assert not (tmp_path / "adapter_config.json").exists()
    assert_equal(load(tmp_path).encode(TEXTS), oracle.embed(tmp_path, None, pairs))
    with pytest.raises(gen_fast.UnsupportedModelError, match="BiModel"):
        load(tmp_path, method="mean")


def test_the_bare_text_is_a_teacher_of_llm2vec_gen(checkpoint):
    """The mean over all tokens, those that the tokenizer puts around among them."""
    write_settings(checkpoint, Settings("weighted_mean", 120, 60))
    reference = oracle.reference().from_pretrained(
        str(checkpoint.parent / "x-mntp"), str(checkpoint)
    )
    encoder = load(checkpoint, method="llm2vec-bare")
    for text, actual in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        ids = reference.tokenizer(text, return_tensors="pt", truncation=True, max_length=120)
        with torch.no_grad():
            states = reference.model(**ids).last_hidden_state[0]
        assert_equal(actual, states.mean(0).numpy())


def test_a_plain_backbone_without_training(smollm2, tiny_model):
    texts, prompt = [*TEXTS, "the " * 700], "Represent this:"
    expected = oracle.embed(smollm2, None, [[prompt, text] for text in texts], batch_size=1)
    assert_equal(load(smollm2, method="llm2vec").encode(texts, prompt=prompt), expected)
    causal, free = load(tiny_model), load(tiny_model, method="llm2vec")
    assert not np.allclose(causal.encode(TEXTS), free.encode(TEXTS), atol=1e-2)


def test_a_text_does_not_depend_on_its_neighbours(checkpoint):
    write_settings(checkpoint, Settings())
    encoder = load(checkpoint, deterministic=True)
    together = encoder.encode(TEXTS, prompt=INSTRUCTION)
    alone = [encoder.encode(text, prompt=INSTRUCTION) for text in TEXTS]
    np.testing.assert_array_equal(together, alone)


def test_no_prompt_is_shared_and_the_last_layer_is_trimmed(checkpoint, passes):
    write_settings(checkpoint, Settings("last_token"))
    encoder = load(checkpoint)
    encoder.encode(TEXTS, prompt=INSTRUCTION)
    assert passes
    assert all(each.prefix is None and each.mask == "bidirectional" for each in passes)
    assert all(each.states == each.texts for each in passes)
    total, computed = encoder.count_tokens(TEXTS, prompt=INSTRUCTION)
    assert total == computed


def test_special_tokens_in_a_text_are_text(checkpoint):
    """Those of the wrapper stay tokens, and nothing that a text spells becomes one."""
    write_settings(checkpoint, Settings())
    encoder = load(checkpoint)
    core = encoder._tokenizer.core
    special = [i for i, token in core.get_added_tokens_decoder().items() if token.special]
    layout = encoder._layout("Say </s>:")
    spelled = ["a <|im_end|> b", "a <|eot_id|>", "<|im_start|>", "</s>"]
    plain, *rows = layout(["a b", *spelled], 0).ids
    for text, ids in zip(spelled, rows, strict=True):
        assert np.isin(ids, special).sum() == np.isin(plain, special).sum()
        assert text in core.decode(ids.tolist(), skip_special_tokens=False)


def test_long_texts_lose_words_and_are_counted(checkpoint):
    write_settings(checkpoint, Settings(max_length=64, doc_max_length=20))
    encoder = load(checkpoint)
    words = "the cat " * 40
    (block,) = encoder.encode_blocks([["a", words, "x" * 90]])
    assert block.truncated == 2
    # What the reference leaves nothing of is cut by tokens.
    assert_equal(block.embeddings[2], encoder.encode("x" * 20))


def test_texts_and_prompts_without_room_or_words(checkpoint):
    write_settings(checkpoint, Settings(max_length=64))
    encoder = load(checkpoint)
    with pytest.raises(gen_fast.PromptError, match="leave no room"):
        encoder.encode("a", prompt="say it " * 60)
    if encoder.identity["llm2vec"]["wrapper"]["after"]:
        assert np.isfinite(encoder.encode("")).all()
        return
    with pytest.raises(gen_fast.TextError, match="row 1 has no token"):
        encoder.encode(["a", ""])


def test_what_decides_the_numbers_is_in_the_identity(checkpoint, tmp_path):
    write_settings(checkpoint, Settings())
    first = identify(checkpoint)
    assert first == {k: v for k, v in load(checkpoint).identity.items() if k != "dtype"}
    json.dumps(first)
    changed = []
    write_settings(checkpoint, Settings("weighted_mean"))
    changed.append(identify(checkpoint))
    write_settings(checkpoint, Settings())
    changed.append(identify(checkpoint, method="llm2vec-bare"))
    changed.append(identify(checkpoint.parent / "x-mntp"))
    assert all(other != first for other in changed)
    assert len(first["backbone"]["adapters_sha256"].split()) == 2
    copy = shutil.copytree(checkpoint, tmp_path / "renamed")
    assert identify(copy, backbone=checkpoint.parent / "x-mntp") == first


def test_it_is_not_exported(checkpoint, tmp_path):
    with pytest.raises(gen_fast.UnsupportedModelError, match="no modules that compute"):
        load(checkpoint).save_as_sentence_transformer(tmp_path / "st")
