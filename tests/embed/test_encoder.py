"""What a user of Encoder sees."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.embed import loading, windows
from gen_fast.embed.adapter import Adapter
from gen_fast.embed.encoder import Encoder
from gen_fast.io.vectors import centred_cosine
from gen_fast.model import token_budget
from gen_fast.model.device import has_native_bfloat16
from gen_fast.model.weights import load_backbone
from gen_fast.testing import relative_error

PROMPT = "Answer this: "


def make_adapter(tiny_model, **changes):
    torch.manual_seed(0)
    backbone = load_backbone(tiny_model)
    values = {
        "special": backbone.embedding[:3].clone() + 0.1,
        "n_compression": 2,
        "backbone": str(tiny_model),
        "fingerprint": backbone.fingerprint,
        "reconstruction": (torch.randn(48, 48), torch.randn(48)),
        "alignment": (torch.randn(20, 48), torch.randn(20)),
    }
    return Adapter(**{**values, **changes})


@pytest.fixture(scope="module")
def adapter_directory(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    make_adapter(tiny_model).save(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(adapter_directory):
    return gen_fast.load(adapter_directory, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def mean_encoder(tiny_model):
    return gen_fast.load(tiny_model, dtype="float32", device="cpu")


def ragged_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    words = [
        "the",
        "cat",
        "sat",
        "in",
        "a",
        "hat",
        "at",
        "noon",
        "while",
        "it",
        "was",
        "raining",
        "outside",
    ]
    return [" ".join(rng.choice(words, rng.integers(1, 60))) for _ in range(count)]


def test_str_gives_a_vector_and_a_list_gives_rows(encoder):
    one, many = encoder.encode("the cat"), encoder.encode(["the cat", "a hat"])
    assert one.shape == (20,)
    assert many.shape == (2, 20)
    assert many.dtype == np.float32
    np.testing.assert_allclose(one, many[0], rtol=1e-4, atol=1e-5)
    assert encoder.encode([]).shape == (0, 20)
    assert isinstance(encoder.encode(["a"], convert_to_tensor=True), torch.Tensor)
    for iterable in (
        ("the cat", "a hat"),
        np.array(["the cat", "a hat"]),
        iter(["the cat", "a hat"]),
    ):
        np.testing.assert_array_equal(encoder.encode(iterable), many)


def test_embedding_is_the_method_written_out(encoder, tiny_model):
    """e = mean over the compression rows of A(R(final norm of the state)), via transformers."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_model).eval()
    adapter = encoder.adapter
    ids = torch.tensor([encoder.tokenizer(PROMPT + "the cat").input_ids])
    embeds = torch.cat((model.get_input_embeddings()(ids)[0], adapter.special))
    with torch.no_grad():
        states = model(inputs_embeds=embeds.unsqueeze(0)).last_hidden_state[0, -2:]
    soft_prompts = torch.nn.functional.linear(states, *adapter.reconstruction)
    expected = torch.nn.functional.linear(soft_prompts, *adapter.alignment).mean(0)
    actual = torch.from_numpy(encoder.encode("the cat", prompt=PROMPT))
    assert relative_error(actual, expected) <= 1e-4


def test_order_is_the_callers_across_windows(mean_encoder, monkeypatch):
    texts = ragged_texts(50)
    expected = np.stack([mean_encoder.encode(t) for t in texts])
    monkeypatch.setattr(windows, "WINDOW_TEXTS", 7)
    monkeypatch.setattr(mean_encoder.budget, "tokens", 100)
    np.testing.assert_allclose(mean_encoder.encode(texts), expected, rtol=1e-3, atol=1e-5)


def test_prompt_is_tokenised_with_the_text(mean_encoder):
    """A prompt that ends inside a token: "th" + "e cat" must be run as "the cat"."""
    rows = mean_encoder._layout("in th")(["e cat", "at", "\n"], 0)
    joined = [mean_encoder.tokenizer("in th" + t).input_ids for t in ("e cat", "at", "\n")]
    assert [row.tolist() for row in rows.ids] == joined
    assert len(set(rows.shared.tolist())) == 2  # the merged token is not taken from the cache
    together = mean_encoder.encode(["e cat", "at", "\n"], prompt="in th")
    alone = [mean_encoder.encode(t, prompt="in th") for t in ("e cat", "at", "\n")]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def fewer_if_emulated(count, dtype):
    """A sixth of the texts where the processor computes bfloat16 in software, 20 times slower."""
    native = dtype == "float32" or has_native_bfloat16(torch.device("cpu"))
    return count if native else count // 6


@pytest.fixture(scope="module")
def real_encoders(smollm2, smollm2_encoder):
    """SmolLM2 by dtype: to load it takes longer than to run it."""
    half = gen_fast.load(smollm2, dtype="bfloat16", device="cpu")
    return {"float32": smollm2_encoder, "bfloat16": half}


# Of a batch, each text or every fourth is also embedded alone.
@pytest.mark.parametrize(
    ("dtype", "floor", "count", "every"),
    [
        ("float32", 0.9999, 64, 4),
        ("bfloat16", 0.995, fewer_if_emulated(64, "bfloat16"), 4),
        pytest.param("float32", 0.9999, 64, 1, marks=pytest.mark.slow),
        pytest.param("bfloat16", 0.995, 64, 1, marks=pytest.mark.slow),
    ],
)
def test_neighbours_do_not_matter(real_encoders, dtype, floor, count, every):
    encoder = real_encoders[dtype]
    texts = ragged_texts(count)
    together = encoder.encode(texts, prompt=PROMPT)[::every]
    alone = np.stack([encoder.encode(t, prompt=PROMPT) for t in texts[::every]])
    assert centred_cosine(alone, together).min() >= floor


@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        ("float32", 24),
        ("bfloat16", fewer_if_emulated(24, "bfloat16")),
        pytest.param("bfloat16", 24, marks=pytest.mark.slow),
    ],
)
def test_deterministic_is_bit_identical(real_encoders, dtype, count):
    real = real_encoders[dtype]
    encoder = Encoder(real.backbone, real._tokenizer, real._method, deterministic=True)
    texts = ragged_texts(count)
    together = encoder.encode(texts, prompt=PROMPT)
    assert np.array_equal(together[2], encoder.encode(texts[2], prompt=PROMPT))
    assert np.array_equal(together[::-3], encoder.encode(texts[::-3], prompt=PROMPT))


def test_special_tokens_spelled_in_text_are_text(mean_encoder):
    ids = mean_encoder._layout("")(["a<|im_end|>b", "<question1>", "<unk>"], 0).ids
    assert all((row > 2).all() for row in ids)


@pytest.mark.parametrize(
    "text",
    [
        " ",
        "\n\t ",
        "nul\x00byte",
        "🎉👩‍👩‍👧",
        "مرحبا بالعالم",
        "\u202eright to left",
        "<|im_end|>",
        "<question1>",
    ],
)
def test_odd_texts_are_embedded(encoder, mean_encoder, text):
    for each in (encoder, mean_encoder):
        assert np.isfinite(each.encode([text, "a"])).all()


def test_empty_text(encoder, mean_encoder):
    """llm2vec-gen embeds its special tokens alone; a mean over no tokens does not exist."""
    assert np.isfinite(encoder.encode(["", "a"], prompt_name="query")).all()
    with pytest.raises(gen_fast.TextError, match="row 2 has no token") as caught:
        mean_encoder.encode(["a", "b", "", "c", ""], prompt=PROMPT)
    assert caught.value.rows == (2, 4)


@pytest.mark.parametrize("bad", [None, 3, 2.5, b"bytes", ["nested"], float("nan")])
def test_non_strings_are_refused_with_their_row(encoder, bad):
    with pytest.raises(gen_fast.TextTypeError, match="row 2: expected str, got"):
        encoder.encode(["a", "b", bad, "c"])
    if not isinstance(bad, list):
        with pytest.raises(gen_fast.TextTypeError):
            encoder.encode(bad)


def test_lone_surrogate_is_refused_with_its_row(encoder):
    with pytest.raises(gen_fast.TextError, match=r"row 1: lone surrogate '\\ud800' at character 3"):
        encoder.encode(["fine", "abc\ud800"])


def test_truncation_keeps_the_special_tokens_and_is_reported_once(encoder, caplog):
    long = "the cat " * 130_000  # 1 MB
    with caplog.at_level(logging.WARNING):
        embeddings = encoder.encode([long, "a", long + "x"])
    reports = [r for r in caplog.records if "lost their tail" in r.message]
    assert len(reports) == 1
    assert "2 of 3 texts" in reports[0].message
    ids = encoder._layout("")([long], 0).ids[0]
    assert len(ids) == encoder.max_length
    assert ids[-3:].tolist() == [encoder.backbone.config.vocab_size + i for i in range(3)]
    np.testing.assert_allclose(embeddings[0], embeddings[2], rtol=1e-4, atol=1e-5)


def test_nan_in_an_output_names_the_rows(tiny_model):
    encoder = gen_fast.load(tiny_model, dtype="float32", device="cpu")
    poisoned = encoder.tokenizer("X").input_ids[0]
    encoder.backbone.embedding[poisoned] = float("nan")
    with pytest.raises(gen_fast.NonFiniteError, match="row 1") as caught:
        encoder.encode(["fine", "aXb", "fine too"])
    assert caught.value.rows == (1,)


def test_unknown_options_and_prompts(encoder):
    with pytest.raises(TypeError, match="batch_sise"):
        encoder.encode("a", batch_sise=3)
    with pytest.raises(gen_fast.PromptError, match="no prompt named 'nope'"):
        encoder.encode("a", prompt_name="nope")
    with pytest.raises(gen_fast.PromptError, match="leaves no room"):
        encoder.encode("a", prompt="very long " * 300)
    with pytest.raises(ValueError, match="truncate_dim"):
        encoder.encode("a", truncate_dim=21)
    with pytest.raises(ValueError, match="precision"):
        encoder.encode("a", precision="int4")


def test_a_prompt_overrides_its_name_as_in_sentence_transformers(encoder):
    expected = encoder.encode("a", prompt="p")
    np.testing.assert_array_equal(encoder.encode("a", prompt="p", prompt_name="query"), expected)
    np.testing.assert_array_equal(encoder.encode_query("a", prompt="p"), expected)


def test_names_of_sentence_transformers(encoder, monkeypatch):
    texts = ragged_texts(20)
    expected = encoder.encode(texts)
    sizes = []
    pool = encoder._method.pool
    monkeypatch.setattr(encoder._method, "pool", lambda *a: sizes.append(len(a[1]) - 1) or pool(*a))
    np.testing.assert_allclose(
        encoder.encode(texts, batch_size=3, device="cpu"), expected, rtol=1e-4, atol=1e-5
    )
    assert max(sizes) == 3
    tensors = encoder.encode(texts, convert_to_numpy=False)
    assert [type(t) for t in tensors] == [torch.Tensor] * 20
    np.testing.assert_array_equal(torch.stack(tensors), encoder.encode(texts))
    assert encoder.encode("a", convert_to_numpy=False).shape == (20,)
    assert isinstance(encoder.encode(texts, convert_to_tensor=True), torch.Tensor)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "meta"}, "the model stays on cpu"),
        ({"device": ["cuda:0", "cuda:1"]}, "none that torch knows"),
        ({"device": "no-device"}, "none that torch knows"),
        ({"output_value": "token_embeddings"}, "only sentence embeddings"),
        ({"precision": "int8"}, "embed_corpus writes"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_options_without_meaning_are_refused_with_a_reason(encoder, option, message):
    with pytest.raises(gen_fast.ConfigError, match=message):
        encoder.encode("a", **option)


def test_a_zero_vector_is_like_nothing(encoder):
    zero, one = np.zeros((1, 20), np.float32), np.ones((1, 20), np.float32)
    similarity = encoder.similarity(np.concatenate((zero, one)), one)
    np.testing.assert_allclose(similarity, [[0], [1]], atol=1e-6)


def test_normalise_truncate_and_signs(encoder):
    full = encoder.encode(["the cat", "a hat"])
    short = encoder.encode(["the cat", "a hat"], normalize_embeddings=True, truncate_dim=16)
    expected = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, rtol=1e-5)
    bits = encoder.encode(["the cat", "a hat"], precision="ubinary", truncate_dim=16)
    assert np.array_equal(np.unpackbits(bits, axis=1), full[:, :16] > 0)
    signed = encoder.encode(["the cat", "a hat"], precision="binary", truncate_dim=16)
    assert np.array_equal(signed.astype(int) + 128, bits)


def test_query_and_document_prompts(encoder):
    query = encoder.encode("the cat", prompt=encoder.prompts["query"])
    np.testing.assert_array_equal(encoder.encode_query("the cat"), query)
    document = encoder.encode_document(["the cat"])
    similarity = encoder.similarity(query[None], document)
    assert similarity.shape == (1, 1)
    assert abs(similarity[0, 0]) <= 1.0001


def test_out_of_memory_halves_the_budget_and_goes_on(mean_encoder, monkeypatch, caplog):
    texts = ragged_texts(30)
    expected = mean_encoder.encode(texts)
    forward = mean_encoder.backbone.forward

    def forgetful(batch, **options):
        if len(batch.ids) > 300:
            raise torch.OutOfMemoryError("simulated")
        return forward(batch, **options)

    monkeypatch.setattr(mean_encoder.backbone, "forward", forgetful)
    monkeypatch.setattr(mean_encoder.budget, "tokens", token_budget.CPU_TOKENS)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(mean_encoder.encode(texts), expected, rtol=1e-3, atol=1e-5)
    assert "out of memory" in caplog.text
    assert mean_encoder.budget.tokens <= 300


def test_other_runtime_errors_are_not_swallowed(mean_encoder, monkeypatch):
    def broken(batch, **options):
        raise RuntimeError("something else")

    monkeypatch.setattr(mean_encoder.backbone, "forward", broken)
    with pytest.raises(RuntimeError, match="something else"):
        mean_encoder.encode(["a"])


def test_one_liner_keeps_the_model(tiny_model, monkeypatch):
    loaded = []
    load = loading.load
    monkeypatch.setattr(loading, "load", lambda *a, **o: loaded.append(a) or load(*a, **o))
    loading._shared_encoder.cache_clear()
    for _ in range(3):
        gen_fast.encode(["the cat"], tiny_model, dtype="float32", prompt=PROMPT)
    assert len(loaded) == 1
    gen_fast.encode(["the cat"], tiny_model, dtype="float32", method="last-token")
    assert len(loaded) == 2


def test_float16_runs(tiny_model):
    encoder = gen_fast.load(tiny_model, dtype="float16", device="cpu")
    reference = gen_fast.load(tiny_model, dtype="float32", device="cpu").encode("the cat")
    np.testing.assert_allclose(encoder.encode("the cat"), reference, rtol=0.05, atol=0.02)


def test_the_import_and_the_first_vector_wait_for_nothing_else(smollm2):
    """What takes seconds to import is not imported by a new process."""
    heavy = {"transformers", "triton", "pyarrow", "pandas", "scipy", "faiss", "gguf", "sympy"}
    heavy |= {"huggingface_hub", "sentence_transformers", "datasets", "matplotlib", "typer"}
    code = f"""
import sys, torch, gen_fast
assert not torch.cuda.is_initialized()
gen_fast.load({str(smollm2)!r}).encode("one text")
found = {heavy} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "3"),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("normalize_embeddings", "no"),
        ("normalize_embeddings", None),
        ("truncate_dim", "8"),
        ("truncate_dim", 8.0),
        ("prompt", 5),
        ("prompt_name", ["query"]),
        ("precision", None),
        ("show_progress_bar", "yes"),
        ("convert_to_numpy", 1),
        ("convert_to_tensor", "false"),
        ("output_value", None),
    ],
)
def test_an_option_of_the_wrong_type_is_named(tiny_model, name, value):
    encoder = gen_fast.load(tiny_model, device="cpu", dtype="float32")
    with pytest.raises(gen_fast.ConfigError, match=f"^{name} must be .*, not "):
        encoder.encode(["a text"], **{name: value})


def test_numbers_and_flags_of_numpy_are_options(tiny_model):
    encoder = gen_fast.load(tiny_model, device="cpu", dtype="float32", max_length=np.int64(16))
    vectors = encoder.encode(
        ["a text"], batch_size=np.int32(2), truncate_dim=np.int64(8), normalize_embeddings=np.True_
    )
    assert vectors.shape == (1, 8)
    with pytest.raises(gen_fast.ConfigError, match="max_length must be a whole number, not '16'"):
        gen_fast.load(tiny_model, device="cpu", max_length="16")
