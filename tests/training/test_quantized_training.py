"""Training over a backbone whose linears are quantised."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_data import train_config, write_answers, write_teacher
from tiny_runs import gem_configs, losses

import gen_fast
from gen_fast.model.choices import GROUP_BITS
from gen_fast.model.linear import GroupWeight
from gen_fast.testing import WHOLE_BLOCKS, save_tiny_model
from gen_fast.training import gem, llm2vec_gen


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of values that 4 bits keep, and 8 bits but for a roundoff of their float16 grids."""
    folder = tmp_path_factory.mktemp("on-grid")
    save_tiny_model(folder, "llama", **WHOLE_BLOCKS)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensors[name] = GroupWeight.of(tensor, "int4").dequantized(torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def llm2vec_gen_losses(model, folder, kind):
    """Of a run over the plain model, and of one over it quantised; both adapters can be loaded."""
    write_answers(folder / "answers.jsonl")
    write_teacher(folder / "teacher.parquet", folder / "answers.jsonl")
    curves = []
    for quantize in (None, kind):
        out = folder / str(quantize)
        config = train_config(folder, model, out=str(out), quantize=quantize, start="random")
        adapter = llm2vec_gen.train(config, show_progress_bar=False)
        curves.append(losses(config))
        gen_fast.load(adapter, quantize=quantize, device="cpu").encode("the cat")
    return curves


@pytest.mark.parametrize("group", GROUP_BITS)
def test_llm2vec_gen_trains_as_over_the_same_values(group, model, tmp_path):
    plain, quantized = llm2vec_gen_losses(model, tmp_path, group)
    assert quantized == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_llm2vec_gen_trains_over_8_bits(kind, model, tmp_path, fp8_by_the_reference):
    plain, quantized = llm2vec_gen_losses(model, tmp_path, kind)
    assert quantized == pytest.approx(plain, rel=0.02 if kind == "int8" else 0.05)
    assert quantized != plain


def test_lora_over_int8_is_refused(model, tmp_path):
    with pytest.raises(gen_fast.ConfigError, match="int8 moves factors into the weights"):
        gem.train(gem_configs(tmp_path, model)("int8", quantize="int8"), show_progress_bar=False)


def test_lora_over_fp8_fits_the_original(model, tmp_path, fp8_by_the_reference):
    make = gem_configs(tmp_path, model)
    configs = [make(str(quantize), quantize=quantize) for quantize in (None, "fp8")]
    folders = [gem.train(config, show_progress_bar=False) for config in configs]
    assert losses(configs[1]) == pytest.approx(losses(configs[0]), rel=0.05)
    assert losses(configs[1]) != losses(configs[0])
    gen_fast.load(folders[1], device="cpu").encode("the cat")


@pytest.mark.parametrize("group", GROUP_BITS)
def test_lora_trains_as_over_the_same_values(group, model, tmp_path):
    make = gem_configs(tmp_path, model)
    configs = [make(str(quantize), quantize=quantize) for quantize in (None, group)]
    for config in configs:
        gem.train(config, show_progress_bar=False)
    assert losses(configs[1]) == pytest.approx(losses(configs[0]), rel=1e-4)
    with pytest.raises(gen_fast.CheckpointError, match="quantize"):
        gem.train(make(group, steps=5), show_progress_bar=False)


def test_what_has_no_meaning_is_refused(model, tmp_path):
    make = gem_configs(tmp_path, model)
    with pytest.raises(gen_fast.ConfigError, match="quantize means nothing with full"):
        make(full=True, quantize="int4")
    with pytest.raises(gen_fast.ConfigError, match="'int3' is not one of int4"):
        make(quantize="int3")
    gen_fast.write_quantized(model, tmp_path / "copy", device="cpu")
    with pytest.raises(gen_fast.UnsupportedModelError, match="takes the original"):
        gem.train(gem_configs(tmp_path, tmp_path / "copy")(full=True), show_progress_bar=False)
