"""GEM models: embedded against transformers and PEFT with a dense mask."""

import json

import numpy as np
import pytest
import torch
from damaged_files import assert_damage_is_refused
from gem_models import save_gem
from oracles import gem as oracle
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import gen_fast
from gen_fast.cli import app
from gen_fast.embed.loading import identify, load_generator
from gen_fast.formats.gem import read_special
from gen_fast.formats.llm2vec import Settings, write_settings
from gen_fast.model.sampling import GREEDY
from gen_fast.testing import forget_checksums, relative_error, save_tiny_model

TEXTS = [
    "where do polar bears live",
    "a",
    "the cat in the hat sat on the mat and ran",
    "",
    "z" * 300,
]
PROMPT = "Represent the text: "


def load(directory, **options):
    return gen_fast.load(directory, dtype="float32", device="cpu", **options)


@pytest.fixture
def gem_model(tiny_model, tmp_path):
    return save_gem(tmp_path / "gem", tiny_model)


def oracle_model(directory, base):
    """transformers' model, which may be one under PEFT's adapter, merged."""
    if not (directory / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, directory).merge_and_unload().eval()


def oracle_states(model, directory, ids):
    tokens = read_special(directory)
    m = tokens.settings.n_special
    with torch.no_grad():
        states = oracle.states(model, ids, tokens.special, (len(ids) - m, len(ids)))
    return states[-m:]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "settings", [{}, {"pooling": "concat"}, {"n_special": 1}, {"full": True}], ids=str
)
def test_embeddings_equal_transformers_with_a_dense_mask(tmp_path, family, settings):
    save_tiny_model(tmp_path / "base", family)
    directory = save_gem(tmp_path / "gem", tmp_path / "base", **settings)
    model = oracle_model(directory, tmp_path / "base")
    encoder = load(directory)
    assert encoder.method == "gem"
    for prompt in ("", PROMPT):
        rows = encoder._layout(prompt)(TEXTS, 0).ids
        states = [oracle_states(model, directory, ids) for ids in rows]
        is_mean = settings.get("pooling", "mean") == "mean"
        expected = torch.stack([s.mean(0) if is_mean else s.flatten() for s in states])
        assert expected.shape[1] == encoder.dimension
        actual = torch.from_numpy(encoder.encode(TEXTS, prompt=prompt))
        assert relative_error(actual, expected) <= 1e-4


def test_a_prompt_is_shared_and_the_last_layer_is_trimmed(gem_model, passes):
    encoder = load(gem_model)
    encoder.encode(TEXTS, prompt=PROMPT)
    assert passes
    assert all(each.prefix is not None and each.mask == "gem" for each in passes)
    assert all(each.states == 3 * each.texts for each in passes)


def test_special_tokens_do_not_see_each_other(gem_model):
    """Another embedding of one changes no other one's state."""
    encoder = load(gem_model)
    path = gem_model / "special.safetensors"
    tensors = load_file(path)
    tensors["special"][0] += 1.0
    edit_settings(gem_model, pooling="concat")
    whole = load(gem_model).encode("the cat").reshape(3, 48)
    save_file(tensors, path)
    other = load(gem_model).encode("the cat").reshape(3, 48)
    assert np.array_equal(whole[1:], other[1:])
    assert not np.allclose(whole[0], other[0], atol=1e-3)
    np.testing.assert_allclose(encoder.encode("the cat"), whole.mean(0), atol=1e-6)


def test_a_text_does_not_depend_on_its_neighbours(gem_model):
    encoder = load(gem_model, deterministic=True)
    together = encoder.encode(TEXTS, prompt=PROMPT)
    alone = [encoder.encode(text, prompt=PROMPT) for text in TEXTS]
    np.testing.assert_array_equal(together, alone)


def test_the_merged_model_is_embedded_by_training_free_methods_too(gem_model, tiny_model):
    own = load(gem_model, method="mean").encode(TEXTS[:3])
    assert not np.allclose(own, load(tiny_model).encode(TEXTS[:3]), atol=1e-2)


def edit_settings(directory, **changes):
    path = directory / "gem.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    forget_checksums(directory)


def test_what_decides_the_numbers_is_in_the_identity(gem_model):
    first = identify(gem_model)
    assert first == {k: v for k, v in load(gem_model).identity.items() if k != "dtype"}
    json.dumps(first)
    edit_settings(gem_model, pooling="concat")
    assert identify(gem_model)["dimension"] == 144
    edit_settings(gem_model, pooling="mean")
    path = gem_model / "special.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "special": tensors["special"] + 1}, path)
    assert identify(gem_model) != first


def test_bad_files_are_named(gem_model, tiny_model, tmp_path):
    cases = [
        ({"format": "gen_fast.gem/9"}, gen_fast.UnsupportedModelError, "not of format"),
        ({"format": "gen_fast.gem/1", "pooling": "max"}, gen_fast.AdapterError, "has no meaning"),
        ({"pooling": "mean", "n_special": "3"}, gen_fast.AdapterError, "n_special '3' has no"),
        ({"n_special": 4}, gen_fast.AdapterError, r"shape \[3, 48\], gem.json says 4 rows"),
        ({"n_special": 3, "max_length": None}, gen_fast.AdapterError, "has keys"),
    ]
    for changes, kind, message in cases:
        edit_settings(gem_model, **changes)
        with pytest.raises(kind, match=message):
            load(gem_model)
    edit_settings(gem_model, max_length=128)
    path = gem_model / "special.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "special": tensors["special"] * torch.nan}, path)
    with pytest.raises(gen_fast.AdapterError, match="not all finite"):
        load(gem_model)
    save_file({"special": tensors["special"]}, path)
    with pytest.raises(gen_fast.AdapterError, match="not special and log_scale"):
        load(gem_model)
    assert_damage_is_refused(path, lambda: load(gem_model), gen_fast.AdapterError)
    (gem_model / "adapter_config.json").unlink()
    with pytest.raises(gen_fast.AdapterError, match="without the adapter"):
        load(gem_model)
    with pytest.raises(gen_fast.UnsupportedModelError, match=r"has no gem\.json"):
        load(tiny_model, method="gem")


def test_another_backbone_is_refused(gem_model, tmp_path):
    save_tiny_model(tmp_path / "other", "llama-tied", seed=1)
    with pytest.raises(gen_fast.BackboneMismatchError, match="trained over other weights"):
        load(gem_model, backbone=tmp_path / "other")


def test_it_is_not_exported(gem_model, tmp_path):
    with pytest.raises(gen_fast.UnsupportedModelError, match="no attention mask in which"):
        load(gem_model).save_as_sentence_transformer(tmp_path / "st")


def test_a_job_embeds_a_corpus_with_it(gem_model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS[:3]) + "\n")
    gen_fast.embed_corpus([texts], tmp_path / "out", model=gem_model, dtype="float32")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert "gem" in json.dumps(plan)


def test_it_generates_as_in_transformers_and_peft(gem_model, tiny_model, tmp_path):
    """Without special tokens: the saved directory is an adapter of PEFT's."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, gem_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    generator = load_generator(
        gem_model, device="cpu", dtype="float32", max_new_tokens=12, sampling=GREEDY
    )
    questions = ["where do seals live", "what is the ice"]
    expected = []
    for question in questions:
        message = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2
            )
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert [answer.text for answer in generator.answers(questions)] == expected
    plain = load_generator(
        tiny_model, device="cpu", dtype="float32", max_new_tokens=12, sampling=GREEDY
    )
    assert [answer.text for answer in plain.answers(questions)] != expected
    (tmp_path / "queries.txt").write_text("\n".join(questions) + "\n")
    out = tmp_path / "answers.jsonl"
    command = ["generate", str(tmp_path / "queries.txt"), "--out", str(out), "--model"]
    command += [
        str(gem_model),
        "--dtype",
        "float32",
        "--max-new-tokens",
        "12",
        "--temperature",
        "0",
    ]
    result = CliRunner().invoke(app, [*command, "-q"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    answers = {row["query"]: row["answer"] for row in rows}
    assert [answers[question] for question in questions] == [text.strip() for text in expected]


def test_an_llm2vec_model_does_not_generate(gem_model):
    write_settings(gem_model, Settings())
    with pytest.raises(gen_fast.UnsupportedModelError, match="it does not generate"):
        load_generator(gem_model)
