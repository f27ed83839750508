"""sentence-transformers' layout: the vectors of that package itself, or a refusal by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from damaged_files import assert_damage_is_refused
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights
from tiny_layouts import (
    SPECIAL_TOKENS,
    TEXTS,
    as_written_before,
    assert_same,
    dense,
    edit_json,
    normalize,
    reference,
    save_backbone,
    save_layout,
)
from transformers import AutoTokenizer
from typer.testing import CliRunner

import gen_fast
from gen_fast.cli import app
from gen_fast.embed.loading import identify
from gen_fast.formats.sentence_modules import POOLING_MODES
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Plan
from gen_fast.testing import byte_tokenizer

VOCABULARY = len(byte_tokenizer())
PROMPTS = {"query": "Find what answers the ", "passage": "About the", "sts": "Like: "}
MODULES = {
    "none": list,
    "normalize": lambda: [normalize()],
    "tanh": lambda: [dense(torch.nn.Tanh)],
    "identity, normalize": lambda: [dense(torch.nn.Identity, bias=False), normalize()],
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """A backbone for each way of putting special tokens around a text."""
    folder = tmp_path_factory.mktemp("backbones")
    kinds = (*SPECIAL_TOKENS, "neither")
    return {kind: save_backbone(folder / kind, special=kind) for kind in kinds}


@pytest.fixture
def layout(backbones, tmp_path):
    """A directory that a test may damage."""
    return save_layout(
        tmp_path / "layout",
        backbones["eos"],
        "lasttoken",
        [dense(torch.nn.Tanh), normalize()],
        prompts=PROMPTS,
    )


def load(directory, **options):
    return gen_fast.load(directory, dtype="float32", device="cpu", **options)


@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("max_seq_length", [None, 24], ids=["whole", "truncated"])
@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_vectors_are_those_of_sentence_transformers(
    pooling, max_seq_length, modules, backbones, tmp_path
):
    save_layout(
        tmp_path / "layout",
        backbones["eos"],
        pooling,
        MODULES[modules](),
        prompts=PROMPTS,
        max_seq_length=max_seq_length,
    )
    encoder, expected = load(tmp_path / "layout"), reference(tmp_path / "layout")
    assert encoder.method == "sentence-transformers"
    assert encoder.dimension == expected.get_embedding_dimension()
    assert encoder.max_length == expected.max_seq_length == (max_seq_length or 512)
    for options in ({}, {"prompt_name": "query"}, {"prompt": "Say: "}):
        assert_same(encoder.encode(TEXTS, **options), expected.encode(TEXTS, **options))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("special", [*SPECIAL_TOKENS, "neither"])
def test_special_tokens_padding_and_prompts_left_out(
    special, include_prompt, padding_side, backbones, tmp_path
):
    for pooling in POOLING_MODES:
        directory = tmp_path / pooling
        save_layout(
            directory,
            backbones[special],
            pooling,
            prompts=PROMPTS,
            include_prompt=include_prompt,
            max_seq_length=24,
        )
        edit_json(directory / "tokenizer_config.json", {"padding_side": padding_side})
        encoder, expected = load(directory), reference(directory)
        assert expected.tokenizer.padding_side == padding_side
        # Without a prompt there is nothing to leave out.
        unprompted = [{}] if include_prompt else []
        for options in (*unprompted, {"prompt_name": "query"}):
            assert_same(encoder.encode(TEXTS, **options), expected.encode(TEXTS, **options))


@pytest.mark.parametrize("max_seq_length", [None, 24])
@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_layout_of_older_releases(pooling, max_seq_length, backbones, tmp_path):
    directory = save_layout(
        tmp_path / "layout", backbones["eos"], pooling, [normalize(), dense(torch.nn.Identity)]
    )
    as_written_before(directory, max_seq_length=max_seq_length)
    encoder, expected = load(directory), reference(directory)
    assert encoder.max_length == expected.max_seq_length
    assert_same(encoder.encode(TEXTS), expected.encode(TEXTS))


def test_without_sentence_bert_config_and_with_a_chat_template(layout):
    # As Qwen3-Embedding is published: the template is then not used.
    (layout / "sentence_bert_config.json").unlink()
    (layout / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert_same(load(layout).encode(TEXTS), reference(layout).encode(TEXTS))


def test_lower_case(layout):
    edit_json(layout / "sentence_bert_config.json", {"do_lower_case": True})
    texts = ["The CAT", "ÄRGER in the Rain"]
    encoder = load(layout)
    assert_same(encoder.encode(texts), reference(layout).encode(texts))
    np.testing.assert_array_equal(encoder.encode(texts[0]), encoder.encode("the cat"))


def test_default_prompt_and_those_of_queries_and_documents(layout):
    edit_json(layout / "config_sentence_transformers.json", {"default_prompt_name": "sts"})
    encoder, expected = load(layout), reference(layout)
    assert encoder.prompts == expected.prompts == {**PROMPTS, "document": ""}
    assert encoder.default_prompt_name == "sts"
    for options in ({}, {"prompt": ""}, {"prompt_name": "query"}, {"prompt": "Say: "}):
        assert_same(encoder.encode(TEXTS, **options), expected.encode(TEXTS, **options))
        assert_same(encoder.encode_query(TEXTS, **options), expected.encode_query(TEXTS, **options))
        assert_same(
            encoder.encode_document(TEXTS, **options), expected.encode_document(TEXTS, **options)
        )
    for model in (encoder, expected):
        del model.prompts["query"], model.prompts["document"]
    assert_same(encoder.encode_query(TEXTS), expected.encode_query(TEXTS))
    assert_same(encoder.encode_document(TEXTS), expected.encode_document(TEXTS))
    assert_same(encoder.encode_document(TEXTS), expected.encode(TEXTS, prompt_name="passage"))


def test_dimensions_kept_by_default(layout):
    edit_json(layout / "config_sentence_transformers.json", {"truncate_dim": 8})
    encoder, expected = load(layout), reference(layout)
    assert (encoder.dimension, encoder.full_dimension) == (8, 20)
    for options in ({}, {"truncate_dim": 16}, {"normalize_embeddings": True}):
        assert_same(encoder.encode(TEXTS, **options), expected.encode(TEXTS, **options))
    with pytest.raises(gen_fast.ConfigError, match="outside 1…20"):
        encoder.encode(TEXTS, truncate_dim=21)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(layout, name):
    edit_json(layout / "config_sentence_transformers.json", {"similarity_fn_name": name})
    encoder, expected = load(layout), reference(layout)
    vectors = encoder.encode(TEXTS)
    similarity = encoder.similarity(vectors, vectors[:2])
    np.testing.assert_allclose(
        similarity, expected.similarity(vectors, vectors[:2]).numpy(), atol=1e-5
    )


def test_prompt_is_run_once_where_it_is_not_pooled(backbones, tmp_path):
    prompts = {"query": "Find what answers this question, which is about the cat: "}
    save_layout(tmp_path / "last", backbones["eos"], "lasttoken", prompts=prompts)
    save_layout(tmp_path / "mean", backbones["eos"], "mean", prompts=prompts)
    last, mean = load(tmp_path / "last"), load(tmp_path / "mean")
    for encoder in (last, mean):
        joined = encoder.encode([prompts["query"] + text for text in TEXTS])
        assert_same(encoder.encode(TEXTS, prompt_name="query"), joined)
    assert len(last.prefixes) == 1
    assert len(mean.prefixes) == 0


def test_a_training_free_method_runs_the_bare_backbone(layout, backbones):
    for method in ("mean", "last-token"):
        ours = load(layout, method=method)
        plain = load(backbones["eos"], method=method)
        assert (ours.method, ours.default_prompt_name) == (method, None)
        np.testing.assert_array_equal(ours.encode(TEXTS), plain.encode(TEXTS))
    as_written_before(layout)
    np.testing.assert_array_equal(
        load(layout, method="mean").encode(TEXTS),
        load(backbones["eos"], method="mean").encode(TEXTS),
    )
    with pytest.raises(gen_fast.UnsupportedModelError, match=r"no modules\.json"):
        load(backbones["eos"], method="sentence-transformers")


def test_one_text_and_its_neighbours(layout):
    encoder = load(layout, deterministic=True)
    together = encoder.encode(TEXTS, prompt_name="query")
    alone = np.stack([encoder.encode(text, prompt_name="query") for text in TEXTS])
    np.testing.assert_array_equal(alone, together)


def test_a_text_without_a_token_is_named(backbones, tmp_path):
    save_layout(tmp_path / "layout", backbones["neither"])
    with pytest.raises(gen_fast.TextError, match="row 1 has no token") as error:
        load(tmp_path / "layout").encode(["x", ""])
    assert error.value.rows == (1,)


def test_identity_covers_all_that_changes_a_number(layout, tmp_path):
    settings, text = "config_sentence_transformers.json", "sentence_bert_config.json"
    changes = [
        (settings, {"prompts": {"query": "Other: "}}),
        (settings, {"default_prompt_name": "sts"}),
        (settings, {"truncate_dim": 8}),
        (text, {"do_lower_case": True}),
        (text, {"max_seq_length": 99}),
        ("1_Pooling/config.json", {"pooling_mode": "mean"}),
        ("1_Pooling/config.json", {"include_prompt": False}),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.linear.Identity"}),
        ("tokenizer_config.json", {"model_max_length": 99}),
    ]
    before = identify(layout)
    assert before == identify(layout)
    assert json.loads(json.dumps(before)) == before
    assert before["dimension"] == 20
    for i, (name, change) in enumerate(changes):
        copy = shutil.copytree(layout, tmp_path / str(i))
        edit_json(copy / name, change)
        assert identify(copy) != before, (name, change)
    weights = {"linear.weight": torch.ones(20, 48), "linear.bias": torch.ones(20)}
    save_file(weights, layout / "2_Dense" / "model.safetensors")
    changed = identify(layout)
    assert changed != before
    modules = json.loads((layout / "modules.json").read_text())
    (layout / "modules.json").write_text(json.dumps(modules[:-1]))
    assert identify(layout) not in (before, changed)


def test_a_job_uses_the_default_prompt(layout, tmp_path):
    edit_json(layout / "config_sentence_transformers.json", {"default_prompt_name": "sts"})
    source, out = tmp_path / "corpus.txt", tmp_path / "job"
    source.write_text("\n".join(TEXTS))
    expected = reference(layout)
    for prompt, text in ((None, PROMPTS["sts"]), ("", "")):
        gen_fast.embed_corpus(source, out, model=layout, dtype="float32", prompt=prompt)
        plan = Plan.load(out)
        assert plan.settings.prompt == text
        embeddings = PartStore(out, plan).embeddings(plan.parts[0])
        assert_same(embeddings, expected.encode(TEXTS, prompt=prompt))
        shutil.rmtree(out)


def test_a_job_may_keep_more_dimensions_than_the_layout_does(layout, tmp_path):
    edit_json(layout / "config_sentence_transformers.json", {"truncate_dim": 8})
    source, out = tmp_path / "corpus.txt", tmp_path / "job"
    source.write_text("\n".join(TEXTS))
    gen_fast.embed_corpus(source, out, model=layout, dtype="float32", truncate_dim=16)
    plan = Plan.load(out)
    embeddings = PartStore(out, plan).embeddings(plan.parts[0])
    assert_same(embeddings, reference(layout).encode(TEXTS, truncate_dim=16))


def test_the_command_uses_the_default_prompt(layout, tmp_path):
    edit_json(layout / "config_sentence_transformers.json", {"default_prompt_name": "sts"})
    source, out = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_text("\n".join(TEXTS))
    options = ["--model", str(layout), "--dtype", "float32", "--device", "cpu", "--quiet"]
    result = CliRunner().invoke(app, ["encode", str(source), "--out", str(out), *options])
    assert result.exit_code == 0, result.stderr
    assert_same(np.load(out), reference(layout).encode(TEXTS))


REFUSED = {
    "another kind of model": (
        "config_sentence_transformers.json",
        {"model_type": "SparseEncoder"},
        "SparseEncoder",
    ),
    "an unknown default prompt": (
        "config_sentence_transformers.json",
        {"default_prompt_name": "nosuch"},
        "nosuch",
    ),
    "another similarity": (
        "config_sentence_transformers.json",
        {"similarity_fn_name": "maxsim"},
        "maxsim",
    ),
    "a special token in a prompt": (
        "config_sentence_transformers.json",
        {"prompts": {"query": "<|im_start|>Find: "}},
        r"prompt 'query' .*im_start",
    ),
    "the chat template": (
        "sentence_bert_config.json",
        {"modality_config": {"text": {}, "message": {}}},
        "chat template",
    ),
    "another task": (
        "sentence_bert_config.json",
        {"transformer_task": "text-generation"},
        "transformer_task 'text-generation'",
    ),
    "another output": (
        "sentence_bert_config.json",
        {"module_output_name": "sentence_embedding"},
        "module_output_name",
    ),
    "options of the model": (
        "sentence_bert_config.json",
        {"model_args": {"attn_implementation": "eager"}},
        "model_args",
    ),
    "a length of queries": ("sentence_bert_config.json", {"query_length": 32}, "query_length"),
    "more positions than there are": (
        "sentence_bert_config.json",
        {"max_seq_length": 513},
        "max_seq_length 513",
    ),
    "several poolings": (
        "1_Pooling/config.json",
        {"pooling_mode": ["mean", "max"]},
        "'mean', 'max'",
    ),
    "an unknown pooling": ("1_Pooling/config.json", {"pooling_mode": "median"}, "'median'"),
    "an unknown key of Pooling": ("1_Pooling/config.json", {"window": 3}, "window"),
    "a pooling of another size": (
        "1_Pooling/config.json",
        {"embedding_dimension": 64},
        "embedding_dimension 64",
    ),
    "another activation": (
        "2_Dense/config.json",
        {"activation_function": "torch.nn.modules.activation.GELU"},
        "GELU",
    ),
    "a residual": ("2_Dense/config.json", {"use_residual": True}, "use_residual"),
    "a Dense over tokens": (
        "2_Dense/config.json",
        {"module_input_name": "token_embeddings"},
        "token_embeddings",
    ),
    "a Dense of another size": ("2_Dense/config.json", {"in_features": 64}, "in_features 64"),
    "a Normalize over tokens": (
        "3_Normalize/config.json",
        {"module_input_name": "token_embeddings"},
        "token_embeddings",
    ),
    "truncation from the left": (
        "tokenizer_config.json",
        {"truncation_side": "left"},
        "truncation_side 'left'",
    ),
    "a PEFT adapter": ("adapter_config.json", {"peft_type": "LORA"}, "PEFT"),
    "own code": ("config.json", {"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"),
    "attention to later tokens": ("config.json", {"is_causal": False}, "is_causal"),
    "another architecture": ("config.json", {"architectures": ["Qwen3BiModel"]}, "Qwen3BiModel"),
    "another family": ("config.json", {"model_type": "bert"}, "'bert'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case, layout):
    file, changes, message = REFUSED[case]
    edit_json(layout / file, changes)
    with pytest.raises(gen_fast.UnsupportedModelError, match=message):
        load(layout)


@pytest.mark.parametrize(
    "kind",
    [
        "sentence_transformers.models.LayerNorm",
        "sentence_transformers.base.modules.router.Router",
        "sentence_transformers.sentence_transformer.modules.static_embedding.StaticEmbedding",
        "custom_st.Normalize",
    ],
)
@pytest.mark.parametrize("place", [0, 3])
def test_other_modules_are_refused(layout, kind, place):
    modules = json.loads((layout / "modules.json").read_text())
    modules[place]["type"] = kind
    (layout / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(gen_fast.UnsupportedModelError, match=kind):
        load(layout)


def test_other_orders_of_modules_are_refused(layout):
    path = layout / "modules.json"
    first, pooling, dense_entry, last = json.loads(path.read_text())
    for entries, message in (
        ([first, dense_entry, pooling], "Dense"),
        ([first, last, pooling], "Normalize"),
        ([first, pooling, pooling], "Pooling"),
        ([first, first, pooling], "Transformer"),
        ([first], "no Pooling"),
        ([pooling], "begins with"),
    ):
        path.write_text(json.dumps(entries))
        with pytest.raises(gen_fast.UnsupportedModelError, match=message):
            load(layout)


def save_word_weights(directory, backbone, weights, default, pooling="mean", **options):
    words = AutoTokenizer.from_pretrained(backbone).convert_ids_to_tokens(range(VOCABULARY))
    modules = [WordWeights(words, weights, default), Pooling(48, pooling, **options)]
    model = SentenceTransformer(modules=[Transformer(str(backbone)), *modules], device="cpu")
    model.save(str(directory), create_model_card=False)


def test_word_weights(backbones, tmp_path):
    """Of weights 0 and 1, where the tokens that count are the last ones."""
    for name, weights, default in (
        ("all but the first", {"<|im_start|>": 0.0}, 1.0),
        ("the last", {"<|im_end|>": 1.0}, 0.0),
    ):
        save_word_weights(tmp_path / name, backbones["both"], weights, default)
        encoder, expected = load(tmp_path / name), reference(tmp_path / name)
        assert_same(encoder.encode(TEXTS), expected.encode(TEXTS))
        assert_same(encoder.encode(TEXTS, prompt="Say"), expected.encode(TEXTS, prompt="Say"))
    identities = [identify(path)["sentence_model"] for path in sorted(tmp_path.iterdir())]
    assert identities[0] != identities[1]


@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_dense_of_token_embeddings(pooling, backbones, tmp_path):
    """A linear map and a mean may change places; elsewhere it is refused."""
    torch.manual_seed(2)
    names = {"module_input_name": "token_embeddings"}
    for activation in (torch.nn.Identity(), torch.nn.Tanh()):
        directory = tmp_path / type(activation).__name__
        first = Dense(48, 20, activation_function=activation, **names)
        modules = [Transformer(str(backbones["both"])), first, Pooling(20, pooling)]
        model = SentenceTransformer(modules=[*modules, normalize()], device="cpu")
        model.save(str(directory), create_model_card=False)
        if pooling in ("max", "mean_sqrt_len_tokens") or isinstance(activation, torch.nn.Tanh):
            with pytest.raises(gen_fast.UnsupportedModelError, match="Dense of token embeddings"):
                load(directory)
        else:
            assert_same(load(directory).encode(TEXTS), reference(directory).encode(TEXTS))


def test_word_weights_that_are_refused(backbones, tmp_path):
    start = {"<|im_start|>": 0.0}
    for message, *arguments in (
        ("other than 0 and 1", {"the": 0.5}, 1.0),
        ("only the mean", start, 1.0, "lasttoken"),
    ):
        save_word_weights(tmp_path / message, backbones["both"], *arguments)
        with pytest.raises(gen_fast.UnsupportedModelError, match=message):
            load(tmp_path / message)
    save_word_weights(tmp_path / "prompt", backbones["both"], start, 1.0, include_prompt=False)
    with pytest.raises(gen_fast.UnsupportedModelError, match="include_prompt"):
        load(tmp_path / "prompt")
    save_word_weights(tmp_path / "between", backbones["both"], {"Ġthe": 0.0}, 1.0)
    with pytest.raises(gen_fast.UnsupportedModelError, match="before all others"):
        load(tmp_path / "between").encode("in the rain")
    save_file({"weight": torch.ones(3, 1)}, tmp_path / "between/1_WordWeights/model.safetensors")
    with pytest.raises(gen_fast.WeightsError, match="a weight for each token"):
        load(tmp_path / "between")


@pytest.mark.parametrize("content", ["{", "[]", '{"type": 1}', '[{"idx": 0}]', '["x"]'])
def test_damaged_modules_json(layout, content):
    (layout / "modules.json").write_text(content)
    with pytest.raises(gen_fast.WeightsError, match=r"modules\.json"):
        load(layout)


@pytest.mark.parametrize("folder", ["/etc", "../elsewhere", "a\\..\\..\\b"])
def test_modules_outside_the_directory(layout, folder):
    modules = json.loads((layout / "modules.json").read_text())
    modules[1]["path"] = folder
    (layout / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(gen_fast.WeightsError, match="leads out of"):
        load(layout)


def test_damaged_dense_weights(layout):
    path = layout / "2_Dense" / "model.safetensors"
    for tensors in (
        {"linear.weight": torch.ones(20, 48)},
        {"linear.weight": torch.ones(20, 47), "linear.bias": torch.ones(20)},
        {"linear.weight": torch.ones(20, 48), "linear.bias": torch.ones(19)},
        {"linear.bias": torch.ones(20)},
        {"weight": torch.ones(20, 48), "linear.bias": torch.ones(20)},
    ):
        save_file(tensors, path)
        with pytest.raises(gen_fast.WeightsError, match="linear map"):
            load(layout)
    assert_damage_is_refused(path, lambda: load(layout), gen_fast.WeightsError)
    torch.save({}, path.with_name("pytorch_model.bin"))
    with pytest.raises(gen_fast.WeightsError, match=r"pickled pytorch_model\.bin is not loaded"):
        load(layout)
