"""GGUF files of every architecture, written here by the gguf package, against transformers."""

import json

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import KINDS, write_gguf
from warm_processes import run_program

import gen_fast
from gen_fast.errors import UnsupportedModelError, WeightsError
from gen_fast.model.gguf import GGUFFile
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.testing import save_tiny_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEN_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Its factors are stored, and read back for the released models' context only.
LLAMA3 = {
    "original_max_position_embeddings": 8192,
    "max_position_embeddings": 16384,
    "rope_theta": 500_000.0,
}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((name, {}) for name in ("llama", "llama-tied", "mistral-window", "qwen2", "qwen3")),
        ("llama", {"num_key_value_heads": 6}),
        ("llama3-rope", LLAMA3),
    ],
)
def test_a_model_of_every_architecture_embeds_as_its_safetensors_do(
    family, changes, tmp_path, cache
):
    model = save_tiny_model(tmp_path / "model", family, **changes)
    write_gguf(tmp_path / "model.gguf", model)
    texts = ["the cat", "a much longer text about other things, with Zahlen 123"]
    gguf_encoder = gen_fast.load(tmp_path / "model.gguf", dtype="float32")
    ids = [gguf_encoder.tokenizer(text, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        expected = [model.model(row).last_hidden_state.mean(1)[0].numpy() for row in ids]
    actual = gguf_encoder.encode(texts)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kind", [KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_1], ids=lambda kind: kind.name
)
def test_stored_floats_are_copied_and_blocks_dequantised(kind, tmp_path):
    model = save_tiny_model(tmp_path / "model", "llama", hidden_size=96)
    write_gguf(tmp_path / "model.gguf", model, kind=kind)
    file = GGUFFile(tmp_path / "model.gguf")
    name = "model.layers.1.mlp.up_proj.weight"
    original = model.state_dict()[name].detach()
    tensor = file.tensor(name)
    copied = {KINDS.F16: torch.float16, KINDS.BF16: torch.bfloat16}.get(kind)
    assert tensor.dtype == (copied or torch.float32)
    assert tensor.nbytes == file.nbytes(name)
    if copied:
        assert torch.equal(tensor, original.to(copied))
    else:
        blocks = gguf.dequantize(gguf.quantize(original.numpy(), kind), kind)
        assert torch.equal(tensor, torch.from_numpy(blocks))
    # q's rows are in another order there, and quantised row by row.
    name = "model.layers.0.self_attn.q_proj.weight"
    error = (file.tensor(name).float() - model.state_dict()[name]).abs().max()
    assert error <= 0.1 * model.state_dict()[name].abs().max()


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_token_ids_are_those_of_transformers(sentencepiece, tmp_path, cache):
    from transformers import AutoTokenizer

    model = save_tiny_model(tmp_path / "model", "llama", vocab_size=384)
    write_gguf(tmp_path / "model.gguf", model, sentencepiece=sentencepiece)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    ours = load_tokenizer(resolve(tmp_path / "model.gguf"))
    for text in ["the cat", " the  cat", "", "Zahlen 123, \u00fc and \u4ed6", "a\n\nb </s> c"]:
        ids = ours.ids(text, add_special_tokens=True).tolist()
        assert ids == theirs(text).input_ids, repr(text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"causal_attention": False}, "not causal"),
        ({"expert_count": 4}, "experts"),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, "scaled rotary"),
        ({"rope_dimension_count": 4}, "part of a head"),
        ({"pooling_type": gguf.PoolingType.LAST}, "pooling"),
        ({"logit_scale": 2.0}, "llama.logit_scale"),
    ],
)
def test_settings_that_change_the_result_are_refused(more, message, tmp_path, cache):
    model = save_tiny_model(tmp_path / "model", "llama")
    write_gguf(tmp_path / "model.gguf", model, **more)
    with pytest.raises(UnsupportedModelError, match=message):
        resolve(tmp_path / "model.gguf")
    assert list(cache.iterdir()) == []


def test_another_architecture_and_garbage_are_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="falcon"):
        GGUFFile(path)
    path.write_bytes(b"no GGUF at all, but long enough to be read as one" * 9)
    with pytest.raises(WeightsError, match="not a GGUF file"):
        GGUFFile(path)


def test_a_tokenizer_that_cannot_be_built_is_said(tmp_path, cache):
    path = tmp_path / "model.gguf"
    write_gguf(path, save_tiny_model(tmp_path / "model", "llama"))
    path.write_bytes(path.read_bytes().replace(b"gpt2", b"what"))
    with pytest.raises(WeightsError, match="its tokenizer cannot be read"):
        resolve(path)
    assert not [folder for folder in cache.iterdir() if folder.name != "remembered"]


def test_large_models_are_converted_shard_by_shard(tmp_path, cache, monkeypatch):
    model = save_tiny_model(tmp_path / "model", "llama")
    write_gguf(tmp_path / "model.gguf", model)
    monkeypatch.setattr("gen_fast.model.shards.SHARD_BYTES", 40_000)
    directory = resolve(tmp_path / "model.gguf")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert gen_fast.load(directory, dtype="float32").encode("the cat").shape == (48,)


def test_conversion_holds_the_result_and_one_tensor(tmp_path):
    """In a process of its own, whose peak is compared with that before."""
    script = f"""
import resource, gguf, torch
from safetensors.torch import save_file
import transformers.integrations.gguf, transformers.tokenization_utils_tokenizers
from gen_fast.model.sources import resolve, packaged_file, _write_converted
from gen_fast.model.gguf import GGUFFile
from pathlib import Path
path = packaged_file("smollm2-135m")
model = GGUFFile(path)
sizes = [model.nbytes(name) for name in model.names()]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_write_converted(path, Path({str(tmp_path)!r}))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024 * (peak - before), sum(sizes), max(sizes))
"""
    done = run_program(script)
    peak, result, largest = map(int, done.stdout.split())
    # The file itself is mapped, and its 92 MB count as they are read.
    assert peak <= result + largest + 150e6, (peak, result, largest)
    for noise in ("it/s", "Loading weights", "Converting"):
        assert noise not in done.stderr
