"""Exports run by sentence-transformers itself: the embeddings of the encoder, or a refusal."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from oracles import llm2vec_gen as oracle
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from test_published_models import ALL_TEXTS, save_mistral_embedding, save_qwen3_embedding
from tiny_layouts import SPECIAL_TOKENS, edit_json, save_backbone, save_random_model
from transformers import AutoTokenizer

import gen_fast
from gen_fast.testing import save_tiny_adapter, tiny_config

PROMPTS = {"query": "Find what answers the ", "document": "About the "}
# Lengths from no token to more than any maximum length used here; what a tokenizer may misread.
TEXTS = [
    "",
    "x",
    "the cat",
    "a café  in the\n rain, 12 hats",
    "<|im_end|> and <|compression_0|><|im_start|>",
    "one word follows the other in the line " * 9,
]
WHOLE = TEXTS[1:]
KINDS = (*SPECIAL_TOKENS, "neither")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """A backbone for each way of putting special tokens around a text."""
    folder = tmp_path_factory.mktemp("backbones")
    return {kind: save_backbone(folder / kind, "llama", kind) for kind in KINDS}


@pytest.fixture(scope="module")
def adapters(backbones, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for kind, backbone in backbones.items():
        save_tiny_adapter(folder / kind, backbone, prompts=PROMPTS)
    return folder


def load(directory, **options):
    return gen_fast.load(directory, dtype="float32", device="cpu", **options)


def exported(encoder, directory, **options):
    encoder.save_as_sentence_transformer(directory, **options)
    return SentenceTransformer(str(directory), device="cpu")


def assert_equal(actual, expected, tolerance=3e-6):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("max_length", [32, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_adapter(kind, max_length, adapters, tmp_path, capfd):
    encoder = load(adapters / kind, max_length=max_length)
    model = exported(encoder, tmp_path / "st")
    assert (model.max_seq_length, model.prompts) == (max_length, PROMPTS)
    assert model.get_embedding_dimension() == encoder.dimension
    assert model.similarity_fn_name == "cosine"
    again = load(tmp_path / "st")
    assert (again.method, again.max_length) == ("sentence-transformers", max_length)
    for options in ({}, {"prompt_name": "query"}, {"prompt": "Say"}):
        expected = encoder.encode(TEXTS, **options)
        assert_equal(model.encode(TEXTS, **options), expected)
        assert_equal(model.encode(TEXTS, batch_size=1, **options), expected)
        assert_equal(again.encode(TEXTS, **options), expected)
    printed = "".join(capfd.readouterr())
    assert not any(word in printed for word in ("UNEXPECTED", "MISSING", "arning"))


@pytest.mark.parametrize("family", ["llama3-rope", "mistral-window", "qwen2", "qwen3"])
def test_adapter_of_every_family(family, tmp_path):
    save_backbone(tmp_path / "backbone", family, "bos")
    save_tiny_adapter(tmp_path / "adapter", tmp_path / "backbone", prompts=PROMPTS)
    encoder = load(tmp_path / "adapter")
    model = exported(encoder, tmp_path / "st")
    assert_equal(model.encode_query(TEXTS), encoder.encode_query(TEXTS))
    assert_equal(load(tmp_path / "st").encode_query(TEXTS), encoder.encode_query(TEXTS))


@pytest.mark.parametrize("model", ["e5-mistral", "SFR-Mistral", "Qwen3-Embedding"])
def test_tokenizers_of_published_models(model, tmp_path):
    backbone = tmp_path / model
    if model == "Qwen3-Embedding":
        backbone.mkdir()
        save_qwen3_embedding(backbone)
    else:
        save_mistral_embedding(backbone, appends=model == "SFR-Mistral")
    save_tiny_adapter(tmp_path / "adapter", backbone, max_length=64)
    encoder = load(tmp_path / "adapter")
    texts = [*ALL_TEXTS, *TEXTS, "<s> </s> <|endoftext|>"]
    # The files are in half precision, to which the special tokens would be rounded.
    st = exported(encoder, tmp_path / "st", dtype="float32")
    assert_equal(st.encode_query(texts), encoder.encode_query(texts))


@pytest.mark.parametrize("spare", [2, 30])
def test_spare_rows_of_the_table_are_used(spare, backbones, tmp_path):
    backbone = save_backbone(tmp_path / "backbone", "llama", "eos")
    size = len(AutoTokenizer.from_pretrained(backbone))
    save_random_model(backbone, tiny_config("llama", size + spare))
    save_tiny_adapter(tmp_path / "adapter", backbone)
    encoder = load(tmp_path / "adapter")
    model = exported(encoder, tmp_path / "st")
    assert model[0].config.vocab_size == size + max(spare, 5)
    assert_equal(model.encode(TEXTS), encoder.encode(TEXTS))


def test_padding_on_the_left_changes_nothing(adapters, tmp_path):
    encoder = load(adapters / "both")
    encoder.save_as_sentence_transformer(tmp_path / "st")
    edit_json(tmp_path / "st" / "tokenizer_config.json", {"padding_side": "left"})
    model = SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert_equal(model.encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize("max_length", [32, 512])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["mean", "weighted-mean", "last-token"])
def test_training_free_methods(method, kind, max_length, backbones, tmp_path):
    encoder = load(backbones[kind], method=method, max_length=max_length)
    if method == "weighted-mean" and kind in ("bos", "both"):
        with pytest.raises(gen_fast.UnsupportedModelError, match="before a text"):
            encoder.save_as_sentence_transformer(tmp_path / "st")
        assert not (tmp_path / "st").exists()
        return
    model = exported(encoder, tmp_path / "st")
    assert_equal(model.encode(WHOLE), encoder.encode(WHOLE))
    assert_equal(load(tmp_path / "st").encode(WHOLE), encoder.encode(WHOLE))
    if method == "last-token":
        prompt = {"prompt": "Find: "}
        assert_equal(model.encode(WHOLE, **prompt), encoder.encode(WHOLE, **prompt))


@pytest.mark.parametrize("kind", ["bos", "neither"])
def test_a_published_checkpoint_equals_the_reference_package(kind, backbones, tmp_path):
    oracle.write_reference_checkpoint(backbones[kind], tmp_path / "published", n_special=4)
    model = exported(load(tmp_path / "published"), tmp_path / "st")
    prompt = model.prompts["query"]
    texts = [text for text in TEXTS if "<|" not in text]  # the reference parses those
    reference = oracle.load_reference(tmp_path / "published", torch.float32)
    expected = reference.encode([prompt + text for text in texts], max_length=512).numpy()
    assert_equal(model.encode_query(texts), expected, 1e-4)


def test_the_shipped_adapter(smollm2, tmp_path):
    encoder = load("smollm2-135m")
    model = exported(encoder, tmp_path / "st")
    texts = ["where do polar bears live", "A violin is a string instrument. " * 30]
    assert_equal(model.encode_query(texts), encoder.encode_query(texts), 1e-5)


def test_weights_in_shards_and_another_dtype(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("gen_fast.model.shards.SHARD_BYTES", 20_000)
    encoder = load(adapters / "bos")
    model = exported(encoder, tmp_path / "st", dtype="bfloat16")
    index = json.loads((tmp_path / "st" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "st" / file, "pt") as tensors:
            assert {tensors.get_tensor(n).dtype for n in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert model.dtype == torch.bfloat16
    assert_equal(model.encode(TEXTS), encoder.encode(TEXTS), 0.05)
    assert_equal(load(tmp_path / "st").encode(TEXTS), encoder.encode(TEXTS), 0.05)


@pytest.mark.parametrize("method", ["echo", "hyde"])
def test_methods_that_no_module_computes(method, tiny_model, tmp_path):
    encoder = load(tiny_model, method=method)
    with pytest.raises(gen_fast.UnsupportedModelError, match=method):
        encoder.save_as_sentence_transformer(tmp_path / "st")


def test_what_is_refused(adapters, backbones, tmp_path):
    encoder = load(adapters / "bos")
    encoder.save_as_sentence_transformer(tmp_path / "st")
    with pytest.raises(gen_fast.ConfigError, match="not an empty directory"):
        encoder.save_as_sentence_transformer(tmp_path / "st")
    with pytest.raises(gen_fast.UnsupportedModelError, match="layout already"):
        load(tmp_path / "st").save_as_sentence_transformer(tmp_path / "again")
    mean = load(backbones["neither"], method="mean")
    mean.prompts["query"] = "Find "
    with pytest.raises(gen_fast.UnsupportedModelError, match="'query'"):
        mean.save_as_sentence_transformer(tmp_path / "again")
    # The backbone of an export already has the tokens that the next one would append.
    save_tiny_adapter(tmp_path / "adapter", tmp_path / "st")
    with pytest.raises(gen_fast.UnsupportedModelError, match="already has a token"):
        load(tmp_path / "adapter").save_as_sentence_transformer(tmp_path / "again")


def test_model_card(adapters, tmp_path):
    result = EvalResult(
        task_type="retrieval",
        dataset_type="owner/questions",
        dataset_name="Questions",
        metric_type="ndcg_at_10",
        metric_value=0.512,
        metric_args={"standard_error": 0.013},
    )
    load(adapters / "bos").save_as_sentence_transformer(tmp_path / "st", evaluation=[result])
    card = ModelCard.load(tmp_path / "st" / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert card.data.base_model is None  # a local path is none of the Hub's models
    assert [r.metric_value for r in card.data.eval_results] == [0.512]
    assert "| retrieval | Questions | ndcg_at_10 | 0.512 ± 0.013 |" in card.text
    assert "trust_remote_code" not in card.text
