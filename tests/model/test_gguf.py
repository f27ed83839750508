"""GGUF files of every architecture, written here by the gguf package, against transformers."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.errors import UnsupportedModelError, WeightsError
from gen_fast.model.gguf import GGUFFile
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.testing import save_tiny_model

KINDS = gguf.GGMLQuantizationType


def write_gguf(path, model, *, kind=KINDS.F32, sentencepiece=False, **more):
    """The file that llama.cpp's converter makes of a model of transformers; more: other keys."""
    config = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.num_key_value_heads != config.num_attention_heads:
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config.model_type == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    for key, value in more.items():
        getattr(writer, f"add_{key}")(value)
    (add_sentencepiece if sentencepiece else add_tokenizer)(writer, config)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config.num_hidden_layers,
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = name.rpartition(".")
        values = tensor.float()
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = len(values) // head_dim
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        stored = f"{names.get_name(module)}.{suffix}"
        plain = values.ndim == 1 or values.shape[-1] % 32
        chosen = KINDS.F32 if plain else kind
        data = gguf.quantize(values.contiguous().numpy(), chosen)
        writer.add_tensor(stored, data, raw_dtype=chosen)
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(config, head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sentencepiece(writer, config):
    """A vocabulary with scores, as of Llama 2 and Mistral."""
    words = [
        "\u2581the",
        "\u2581t",
        "\u2581a",
        "th",
        "he",
        "the",
        "\u2581c",
        "at",
        "cat",
        "\u2581cat",
    ]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters))]
    more = config.vocab_size - len(tokens)
    tokens, kinds = tokens + [f"<filler{i}>" for i in range(more)], kinds + [5] * more
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def add_tokenizer(writer, config):
    letters = list(gguf_alphabet())
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *letters, "th"]
    tokens += [f"<filler{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def gguf_alphabet():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def rope_factors(config, head_dim):
    """What transformers' own inverse frequencies are divided by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (plain / scaled).numpy()


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
from gen_fast.model.sources import resolve, _packaged_file, _write_converted
from gen_fast.model.gguf import GGUFFile
from pathlib import Path
path = _packaged_file("smollm2-135m")
model = GGUFFile(path)
sizes = [model.nbytes(name) for name in model.names()]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_write_converted(path, Path({str(tmp_path)!r}))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(1024 * (peak - before), sum(sizes), max(sizes))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    peak, result, largest = map(int, done.stdout.split())
    # The file itself is mapped, and its 92 MB count as they are read.
    assert peak <= result + largest + 150e6, (peak, result, largest)
    for noise in ("it/s", "Loading weights", "Converting"):
        assert noise not in done.stderr
