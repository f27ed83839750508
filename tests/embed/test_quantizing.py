"""Quantised copies on disk, and what uses them."""

import json

import numpy as np
import pytest
from gem_models import save_gem
from tiny_gguf import KINDS, write_gguf
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import gen_fast
from gen_fast.cli.app import app
from gen_fast.embed.sample_texts import SAMPLE_TEXTS
from gen_fast.errors import ConfigError, JobError, UnsupportedModelError, WeightsError
from gen_fast.model.choices import GROUP_BITS, QUANTIZED
from gen_fast.testing import WHOLE_BLOCKS, save_tiny_adapter, save_tiny_model

TEXTS = ["the cat", "a hat in the rain", "one word follows the other in the line " * 4]
ON_CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    save_tiny_model(folder, "qwen2", **WHOLE_BLOCKS)
    return folder


@pytest.fixture(scope="module", params=QUANTIZED)
def kind(request, fp8_by_the_reference):
    return request.param


@pytest.fixture(scope="module")
def copy(model, kind):
    folder = model.with_name(f"copy-{kind}")
    gen_fast.write_quantized(model, folder, quantize=kind, device="cpu")
    return folder


def embedded(name, **options):
    return np.asarray(gen_fast.load(name, **ON_CPU, **options).encode(TEXTS))


def test_a_copy_is_what_quantize_gives(model, copy, kind):
    assert np.array_equal(embedded(copy), embedded(model, quantize=kind))
    assert not np.array_equal(embedded(copy), embedded(model))
    encoder = gen_fast.load(copy, **ON_CPU)
    assert encoder.identity["quantize"] == kind
    assert "quantize" not in gen_fast.load(model, **ON_CPU).identity


def test_a_copy_says_what_it_is(model, copy):
    recipe = json.loads((copy / "quantization.json").read_text())
    assert recipe["source"] == str(model)
    assert recipe["quality"]["texts"] == len(SAMPLE_TEXTS)
    assert 0 < recipe["quality"]["centred_cosine_min"] <= recipe["quality"]["centred_cosine_mean"]
    assert recipe["quality"]["centred_cosine_mean"] < 1


def test_an_adapter_of_the_original_fits_its_copy(model, copy, kind, tmp_path):
    save_tiny_adapter(tmp_path, model)
    over_copy = embedded(tmp_path, backbone=copy)
    assert np.array_equal(over_copy, embedded(tmp_path, quantize=kind))
    save_tiny_model(tmp_path / "other", "qwen2", seed=1, **WHOLE_BLOCKS)
    gen_fast.write_quantized(
        tmp_path / "other", tmp_path / "other-copy", quantize=kind, device="cpu"
    )
    with pytest.raises(gen_fast.BackboneMismatchError, match="embed_tokens"):
        embedded(tmp_path, backbone=tmp_path / "other-copy")


def test_a_layout_of_sentence_transformers_is_copied_whole(model, tmp_path):
    exported = gen_fast.load(model, method="last-token", **ON_CPU)
    exported.prompts["query"] = "find: "
    exported.save_as_sentence_transformer(tmp_path / "layout")
    gen_fast.write_quantized(tmp_path / "layout", tmp_path / "copy", device="cpu")
    copy = gen_fast.load(tmp_path / "copy", **ON_CPU)
    assert copy.method == "sentence-transformers"
    assert copy.prompts["query"] == "find: "
    expected = embedded(tmp_path / "layout", quantize="int4")
    assert np.array_equal(np.asarray(copy.encode(TEXTS)), expected)
    with pytest.raises(UnsupportedModelError, match="is quantised"):
        gen_fast.load(tmp_path / "copy", method="mean", **ON_CPU).save_as_sentence_transformer(
            tmp_path / "again"
        )


def test_transformers_refuses_a_copy(copy):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_copy_in_fp8_is_refused_where_it_cannot_be_compared(model, tmp_path, monkeypatch):
    monkeypatch.setattr("gen_fast.ops.FORCED", None)
    with pytest.raises(ConfigError, match="fp8 needs a GPU of sm_89"):
        gen_fast.write_quantized(model, tmp_path / "copy", quantize="fp8", device="cpu")
    assert not (tmp_path / "copy").exists()
    options = ["quantize", str(model), "--to", "fp8", "--device", "cpu"]
    done = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "copy")])
    assert done.exit_code != 0
    assert "fp8 needs a GPU of sm_89" in done.output


def test_what_cannot_be_quantised_is_refused(model, copy, kind, tmp_path):
    write = gen_fast.write_quantized
    with pytest.raises(ConfigError, match=f"quantised already, to {kind}"):
        write(copy, tmp_path / "twice")
    with pytest.raises(ConfigError, match=f"quantised already, to {kind}"):
        gen_fast.load(copy, quantize=kind)
    with pytest.raises(ConfigError, match="not an empty directory"):
        write(model, copy)
    with pytest.raises(ConfigError, match="at least 20 texts, not on 3"):
        write(model, tmp_path / "few", texts=["a", "b", "c"])
    with pytest.raises(ConfigError, match="calibrated on at least 20 texts, not on 2"):
        write(model, tmp_path / "few", quantize="int8", calibration=["a", "b"])
    with pytest.raises(ConfigError, match="'int2' is not one of int4, int8-weight-only, int8,"):
        write(model, tmp_path / "int2", quantize="int2")
    save_tiny_adapter(tmp_path / "adapter", model)
    with pytest.raises(UnsupportedModelError, match="is an adapter"):
        write(tmp_path / "adapter", tmp_path / "of-adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_recipe_of_a_later_version_is_refused(model, copy, tmp_path, monkeypatch):
    monkeypatch.setattr("gen_fast.model.quantized.FORMAT", "gen_fast.quantized/0")
    with pytest.raises(WeightsError, match="not read by this version"):
        embedded(copy)


@pytest.mark.parametrize("group", GROUP_BITS)
def test_the_command_writes_a_copy_that_jobs_and_searches_take(group, model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(SAMPLE_TEXTS))
    run = CliRunner().invoke
    options = ["quantize", str(model), "--to", group, "--texts", str(texts), "--device", "cpu"]
    done = run(app, [*options, "--out", str(tmp_path / "copy")])
    assert done.exit_code == 0, done.output
    assert f"{group}, over 40 texts centred cosine" in done.output
    of_copy, of_model = tmp_path / "copy.parquet", tmp_path / "model.parquet"
    encode = ["encode", str(texts), "--device", "cpu", "--dtype", "float32", "--quiet"]
    run(app, [*encode, "--model", str(tmp_path / "copy"), "--out", str(of_copy)])
    run(app, [*encode, "--model", str(model), "--quantize", group, "--out", str(of_model)])
    read = gen_fast.io.embedding_files.read_embeddings
    assert np.array_equal(read(of_copy).vectors, read(of_model).vectors)
    # A search goes on with the weights that the file was made with.
    printed = []
    for file, recorded in ((of_copy, ""), (of_model, group)):
        assert read(file).metadata.quantize == recorded
        found = run(app, ["search", str(file), "a train ticket", "--dtype", "float32", "--quiet"])
        assert found.exit_code == 0, found.output
        printed.append(found.stdout)
    assert printed[0] == printed[1]
    by_float = run(
        app, ["search", str(of_copy), "a train ticket", "--model", str(model), "--quiet"]
    )
    assert by_float.stdout != printed[0]


def test_the_command_calibrates_on_texts_of_ones_own(model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"{word} " * 9 for word in SAMPLE_TEXTS))
    command = ["quantize", str(model), "--device", "cpu", "--calibrate", str(texts)]
    out = tmp_path / "copy"
    done = CliRunner().invoke(app, [*command, "--to", "int8", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "int8, over 40 texts centred cosine" in done.output
    assert not np.array_equal(embedded(out), embedded(model, quantize="int8"))
    refused = CliRunner().invoke(app, [*command, "--to", "int4", "--out", str(tmp_path / "other")])
    assert refused.exit_code == 2
    assert "--calibrate means nothing with --to int4" in refused.output


def test_a_whole_gem_model_is_copied_with_its_special_tokens(model, tmp_path):
    base = tmp_path / "base"
    save_tiny_model(base, "llama", **WHOLE_BLOCKS)
    whole = save_gem(tmp_path / "gem", base, full=True)
    gen_fast.write_quantized(whole, tmp_path / "copy", device="cpu")
    assert gen_fast.load(tmp_path / "copy", **ON_CPU).method == "gem"
    assert np.array_equal(embedded(tmp_path / "copy"), embedded(whole, quantize="int4"))


def test_a_job_goes_on_with_the_same_weights_only(model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(SAMPLE_TEXTS))
    out = tmp_path / "job"
    shared = {"model": str(model), "dtype": "float32", "devices": "cpu", "show_progress_bar": False}
    gen_fast.embed_corpus(texts, out, quantize="int4", **shared)
    assert json.loads((out / "plan.json").read_text())["settings"]["quantize"] == "int4"
    with pytest.raises(JobError, match="quantize"):
        gen_fast.embed_corpus(texts, out, **shared)


def test_a_gguf_file_of_q8_0_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GEN_FAST_CACHE", str(tmp_path / "cache"))
    original = save_tiny_model(tmp_path / "original", "llama", **WHOLE_BLOCKS)
    write_gguf(tmp_path / "model.gguf", original, kind=KINDS.Q8_0)
    expected = embedded(tmp_path / "model.gguf")
    actual = embedded(tmp_path / "model.gguf", quantize="int8-weight-only")
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    gen_fast.write_quantized(
        tmp_path / "model.gguf", tmp_path / "copy", quantize="int8-weight-only", device="cpu"
    )
    assert np.array_equal(embedded(tmp_path / "copy"), actual)
