"""A fingerprint means the model: each tensor and each setting that changes a number."""

import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from gen_fast.embed.loading import identify
from gen_fast.io import durable
from gen_fast.io.cache import remembered
from gen_fast.model.fingerprint import differences
from gen_fast.model.weights import load_backbone, read_fingerprint
from gen_fast.testing import edit_config, save_tiny_model


@pytest.fixture
def model(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3")
    return tmp_path / "model"


def rewrite(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_of_files_and_of_what_was_loaded_from_them(model):
    assert read_fingerprint(model) == load_backbone(model).fingerprint
    assert read_fingerprint(model) == load_backbone(model, dtype=torch.bfloat16).fingerprint
    assert identify(model)["backbone"] == read_fingerprint(model)


def test_the_last_bit_of_a_float32_is_another_copy_of_the_same_model(model):
    before = read_fingerprint(model)

    def flip(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"].view(torch.int32)[3, 5] ^= 1

    rewrite(model, flip)
    assert differences(before, read_fingerprint(model)) == []
    assert differences(before, read_fingerprint(model), same_copy=True) == ["stored_sha256"]


def test_what_an_adapter_does_not_care_about(model):
    before = read_fingerprint(model)
    edit_config(model, max_position_embeddings=1024)
    assert differences(before, read_fingerprint(model)) == []
    assert differences(before, read_fingerprint(model), same_copy=True) == ["max_positions"]
    rewrite(model, lambda tensors: tensors.pop("lm_head.weight"))
    assert differences(before, read_fingerprint(model)) == []


def test_a_fingerprint_of_an_earlier_version_is_compared_as_far_as_it_goes(model):
    now = read_fingerprint(model)
    earlier = ("family", "hidden_size", "rope_theta", "embedding_sha256", "layers_sha256")
    recorded = {key: now[key] for key in earlier}
    assert differences(recorded, now) == []
    rewrite(model, lambda t: t["model.layers.2.mlp.down_proj.weight"].mul_(1.5))
    assert differences(recorded, read_fingerprint(model)) == ["layers_sha256"]
    assert differences({}, now) == []
    assert differences(recorded, {**now, "adapters_sha256": "of one"}) == ["adapters_sha256"]


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """A file of an hour ago, and a computation that counts its runs."""
    monkeypatch.setenv("GEN_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "file"
    path.write_text("a")
    runs = []

    def compute():
        runs.append(path.read_text())
        return [*runs]

    return path, compute, runs


def settle(monkeypatch):
    """Let an hour pass."""
    now = time.time_ns()
    monkeypatch.setattr(durable.time, "time_ns", lambda: now + 3600 * 10**9)


def test_what_is_remembered_of_a_file(counted, monkeypatch):
    path, compute, runs = counted
    remembered(path, "text", compute)
    assert remembered(path, "text", compute) == ["a", "a"]  # too young to be trusted
    settle(monkeypatch)
    assert remembered(path, "text", compute) == ["a", "a", "a"]
    assert remembered(path, "text", compute) == ["a", "a", "a"]
    assert remembered(path, "other", compute) == ["a", "a", "a", "a"]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("b")
    os.utime(path, ns=times)  # as a program may that means to hide it
    assert remembered(path, "text", compute)[-1] == "b"
    assert len(runs) == 5


def test_a_memory_that_is_damaged_is_forgotten(counted, monkeypatch, tmp_path):
    path, compute, _ = counted
    settle(monkeypatch)
    remembered(path, "text", compute)
    (kept,) = (tmp_path / "cache" / "remembered").iterdir()
    kept.write_text(kept.read_text().replace('"a"', '"c"'))
    assert remembered(path, "text", compute) == ["a", "a"]
    for damaged in ("", "[1", "[" * 100_000, "5", "{}"):
        kept.write_text(damaged)
        assert remembered(path, "text", compute)[-1] == "a"


def test_a_cache_that_cannot_be_written_costs_time_only(counted, monkeypatch, tmp_path):
    path, compute, _ = counted
    settle(monkeypatch)
    (tmp_path / "cache").write_text("not a directory")
    assert remembered(path, "text", compute) == ["a"]
    assert remembered(path, "text", compute) == ["a", "a"]
