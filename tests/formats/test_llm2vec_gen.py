"""Checkpoints in the reference package's layout, against the reference package itself."""

import shutil

import numpy as np
import pytest
import torch
from oracles import llm2vec_gen as oracle

import gen_fast
from gen_fast.formats.llm2vec_gen import read_checkpoint
from gen_fast.testing import save_tiny_model

TEXTS = [
    "where do polar bears live and what's their habitat",
    "what does disk cleanup mean on a computer",
    "a",
    "Polar bears live throughout the circumpolar North in the Arctic, " * 8,
]


@pytest.fixture(scope="module")
def tiny_checkpoint(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference")
    oracle.write_reference_checkpoint(tiny_model, directory, n_special=4)
    return directory


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


def test_real_weights_equal_the_reference_package(smollm2, tmp_path):
    oracle.write_reference_checkpoint(smollm2, tmp_path)
    reference = oracle.load_reference(tmp_path, torch.float32)
    prompt = "Generate a passage that best answers this question: "
    asked = [prompt + text for text in TEXTS]
    for max_length in (64, 512):
        expected = reference.encode(asked, max_length=max_length).numpy()
        encoder = gen_fast.load(tmp_path, dtype="float32", device="cpu", max_length=max_length)
        assert encoder.prompts["query"] == prompt
        actual = encoder.encode_query(TEXTS)
        assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_saved_again_in_our_format(tiny_checkpoint, tmp_path):
    imported = gen_fast.load(tiny_checkpoint, dtype="float32")
    imported.adapter.save(tmp_path)
    again = gen_fast.load(tmp_path, dtype="float32")
    assert again.adapter.fingerprint
    np.testing.assert_array_equal(imported.encode(TEXTS), again.encode(TEXTS))


@pytest.mark.parametrize("name", ["reconstruction_mlp", "alignment_mlp", "run_config.yml"])
def test_missing_parts_are_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(gen_fast.AdapterError, match=name):
        read_checkpoint(checkpoint)


def test_missing_encoder_directory(checkpoint):
    shutil.rmtree(checkpoint / "encoder")
    with pytest.raises(gen_fast.AdapterError, match="without encoder/"):
        gen_fast.load(checkpoint)


def test_projection_that_would_run_code_is_refused(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"config": Evil()}, checkpoint / "alignment_mlp")
    with pytest.raises(gen_fast.AdapterError, match="without running code"):
        read_checkpoint(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_damaged_projection(checkpoint):
    path = checkpoint / "alignment_mlp"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(gen_fast.AdapterError, match="alignment_mlp"):
        read_checkpoint(checkpoint)


def test_checkpoint_of_another_backbone(checkpoint, tmp_path):
    other = tmp_path / "other"
    save_tiny_model(other, "mistral", seed=1)
    with pytest.raises(gen_fast.BackboneMismatchError, match="embedding table"):
        gen_fast.load(checkpoint, backbone=other)


def test_lora_over_the_backbone_is_refused(checkpoint):
    path = checkpoint / "encoder" / "adapter_config.json"
    path.write_text(path.read_text().replace("TRAINABLE_TOKENS", "LORA"))
    with pytest.raises(gen_fast.AdapterError, match="LORA"):
        read_checkpoint(checkpoint)


def test_python_tags_in_run_config_run_nothing(checkpoint, tmp_path):
    marker = tmp_path / "executed"
    with (checkpoint / "run_config.yml").open("a") as file:
        file.write(f"output_dir: !!python/object/apply:os.system ['touch {marker}']\n")
    read_checkpoint(checkpoint)
    assert not marker.exists()
