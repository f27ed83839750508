"""Adapters of ours: saved, loaded, damaged, misapplied."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

import gen_fast
from gen_fast.embed.adapter import Adapter
from gen_fast.testing import (
    edit_config,
    forget_checksums,
    save_tiny_adapter,
    save_tiny_model,
)


@pytest.fixture(scope="module")
def saved(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    save_tiny_adapter(directory, tiny_model, prompts={"query": "Q: "})
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


def test_round_trip(saved):
    adapter = Adapter.load(saved)
    again = Adapter.load(saved)
    assert adapter.n_special == 5
    assert adapter.n_compression == 3
    assert adapter.dimension == 20
    assert adapter.prompts == {"query": "Q: "}
    for name, tensor in adapter.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
    names = {"adapter.safetensors", "config.json", "README.md", "checksums.json"}
    assert {path.name for path in saved.iterdir()} == names


def test_projection_is_the_composition():
    r, a = (torch.randn(8, 8), torch.randn(8)), (torch.randn(3, 8), torch.randn(3))
    adapter = Adapter(torch.randn(2, 8), 2, "x", reconstruction=r, alignment=a)
    x = torch.randn(5, 8)
    expected = torch.nn.functional.linear(torch.nn.functional.linear(x, *r), *a)
    torch.testing.assert_close(torch.nn.functional.linear(x, *adapter.projection()), expected)
    assert Adapter(torch.randn(2, 8), 2, "x", None, None).projection() is None
    assert Adapter(torch.randn(2, 8), 2, "x", None, None).dimension == 8


@pytest.mark.parametrize("position", [0, 9, 200, -1])
def test_a_flipped_bit_in_the_file_is_noticed(directory, position):
    """The header is checked by safetensors; values by their digest in config.json."""
    path = directory / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(gen_fast.AdapterError):
        gen_fast.load(directory)


def test_truncated_file(directory):
    path = directory / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(gen_fast.AdapterError, match="damaged"):
        gen_fast.load(directory)


def test_pickle_in_place_of_safetensors(directory):
    torch.save({"special_tokens": torch.zeros(5, 48)}, directory / "adapter.safetensors")
    forget_checksums(directory)
    with pytest.raises(gen_fast.AdapterError, match="not a safetensors file"):
        gen_fast.load(directory)


@pytest.mark.parametrize("missing", ["adapter.safetensors", "config.json"])
def test_missing_file(directory, missing):
    (directory / missing).unlink()
    with pytest.raises(gen_fast.AdapterError, match=missing):
        gen_fast.load(directory)


@pytest.mark.parametrize("key", ["backbone", "n_compression", "prompts", "sha256"])
def test_missing_config_key(directory, key):
    edit_config(directory, **{key: None})
    with pytest.raises(gen_fast.AdapterError, match=key):
        gen_fast.load(directory)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format"', "\xff"])
def test_a_missing_or_damaged_config_is_an_adapter_error(directory, content):
    path = directory / "config.json"
    path.unlink() if content is None else path.write_text(content, encoding="latin-1")
    with pytest.raises(gen_fast.AdapterError, match=r"config\.json"):
        Adapter.load(directory)


@pytest.mark.parametrize(("key", "value"), [("backbone", 3), ("n_compression", "three")])
def test_a_config_value_of_the_wrong_type_is_named(directory, key, value):
    edit_config(directory, **{key: value})
    with pytest.raises(gen_fast.AdapterError, match="wrong type"):
        Adapter.load(directory)


def test_another_format_version(directory):
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("gen_fast.adapter/1", "gen_fast.adapter/9"))
    with pytest.raises(gen_fast.AdapterError, match=r"gen_fast\.adapter/9"):
        gen_fast.load(directory)


def test_another_backbone_is_refused_with_what_differs(directory, tmp_path):
    save_tiny_model(tmp_path / "qwen", "qwen3")
    with pytest.raises(gen_fast.BackboneMismatchError, match=r"'llama'.*'qwen3'"):
        gen_fast.load(directory, backbone=tmp_path / "qwen")


def test_backbone_of_the_same_shape_with_other_weights_is_refused(directory, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tiny_model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(gen_fast.BackboneMismatchError, match="layers_sha256"):
        gen_fast.load(directory, backbone=other)


def test_moved_backbone_is_found_by_argument(directory, tiny_model, tmp_path):
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    a = gen_fast.load(directory, dtype="float32").encode("the cat")
    b = gen_fast.load(directory, backbone=moved, dtype="float32").encode("the cat")
    np.testing.assert_array_equal(a, b)


def test_method_and_backbone_arguments_that_make_no_sense(directory, tiny_model):
    with pytest.raises(gen_fast.UnsupportedModelError, match="mean"):
        gen_fast.load(directory, method="mean")
    with pytest.raises(gen_fast.AdapterError, match="holds no adapter"):
        gen_fast.load(tiny_model, backbone=tiny_model)


def test_non_finite_values_are_refused():
    with pytest.raises(gen_fast.AdapterError, match="special_tokens holds NaN"):
        Adapter(torch.full((2, 8), float("nan")), 1, "x", None, None)


@pytest.mark.parametrize("n_compression", [0, 3])
def test_token_counts_must_fit(n_compression):
    with pytest.raises(gen_fast.AdapterError, match="do not fit"):
        Adapter(torch.zeros(2, 8), n_compression, "x", None, None)


def test_results_are_added_to_the_card_and_nothing_else_changes(saved, tmp_path):
    result = EvalResult("retrieval", "owner/questions", "Questions", "ndcg_at_10", 0.5)
    Adapter.load(saved).save(tmp_path / "with", evaluation=[result])
    Adapter.load(saved).save(tmp_path / "without")
    for name in ("adapter.safetensors", "config.json"):
        assert (tmp_path / "with" / name).read_bytes() == (saved / name).read_bytes()
    assert (tmp_path / "without" / "README.md").read_bytes() == (saved / "README.md").read_bytes()
    card = ModelCard.load(tmp_path / "with" / "README.md")
    assert card.data.library_name == "gen-fast"
    assert [r.metric_value for r in card.data.eval_results] == [0.5]
    assert card.text.startswith((saved / "README.md").read_text().split("---\n")[2])


class LocalHub:
    """HfApi of a Hub that is a directory."""

    root: Path

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **options):
        (self.root / repo_id).mkdir(parents=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"commit of {repo_id}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalHub, "root", tmp_path / "hub", raising=False)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", LocalHub)
    return tmp_path / "hub"


def test_push_and_from_pretrained(saved, hub):
    assert Adapter.load(saved).push_to_hub("owner/adapter") == "commit of owner/adapter"
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert {p.name: p.read_bytes() for p in (hub / "owner/adapter").iterdir()} == files
    adapter = Adapter.from_pretrained(hub / "owner/adapter")
    assert adapter.weights_hash() == Adapter.load(saved).weights_hash()


def test_push_of_an_export(saved, hub):
    encoder = gen_fast.load(saved, dtype="float32", device="cpu")
    encoder.push_to_hub("owner/export")
    again = gen_fast.load(hub / "owner/export", dtype="float32", device="cpu")
    np.testing.assert_allclose(again.encode("the cat"), encoder.encode("the cat"), atol=1e-5)


def test_from_pretrained_of_nothing(tmp_path):
    with pytest.raises(gen_fast.ModelNotFoundError, match="owner/none"):
        Adapter.from_pretrained("owner/none", local_files_only=True, cache_dir=tmp_path)
    for content in (None, "{", "[]"):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(gen_fast.AdapterError, match="not an adapter"):
            Adapter.from_pretrained(tmp_path)
