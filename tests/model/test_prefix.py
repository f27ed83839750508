"""The cache of instruction keys and values."""

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.model.prefix import PrefixCache
from gen_fast.model.weights import load_backbone
from gen_fast.testing import save_tiny_model


@pytest.fixture(scope="module")
def backbone(tiny_model):
    return load_backbone(tiny_model)


def test_bounded_by_bytes_oldest_out_first(backbone):
    one = backbone.prefill((1, 2, 3)).nbytes
    cache = PrefixCache(backbone, max_bytes=2 * one)
    first, second = (1, 2, 3), (4, 5, 6)
    kept = cache.get(first)
    cache.get(second)
    assert cache.get(first) is kept
    cache.get((7, 8, 9))  # pushes out `second`, used longest ago
    assert len(cache) == 2
    assert cache.nbytes <= 2 * one
    assert cache.get(first) is kept


def test_a_prefix_beyond_the_bound_is_used_but_not_kept(backbone, caplog):
    cache = PrefixCache(backbone, max_bytes=10)
    assert len(cache.get((1, 2, 3))) == 3
    assert len(cache) == 0
    assert "not kept" in caplog.text


def test_saved_and_loaded(backbone, tmp_path):
    cache = PrefixCache(backbone)
    cache.get((1, 2, 3)), cache.get(tuple(range(200)))
    cache.save(tmp_path / "prefixes.safetensors")
    loaded = PrefixCache(backbone)
    assert loaded.load(tmp_path / "prefixes.safetensors") == 2
    for ids in ((1, 2, 3), tuple(range(200))):
        for (k, v), (k2, v2) in zip(cache.get(ids).layers, loaded.get(ids).layers, strict=True):
            assert torch.equal(k, k2)
            assert torch.equal(v, v2)


def test_loaded_prefix_gives_the_same_embeddings(tiny_model, tmp_path):
    prompt = "in the " * 40
    first = gen_fast.load(tiny_model, dtype="float32")
    expected = first.encode(["a cat", "a hat"], prompt=prompt)
    first.prefixes.save(tmp_path / "p")
    second = gen_fast.load(tiny_model, dtype="float32")
    second.prefixes.load(tmp_path / "p")
    np.testing.assert_array_equal(second.encode(["a cat", "a hat"], prompt=prompt), expected)


def test_cache_of_another_model_or_dtype_is_refused(backbone, tiny_model, tmp_path):
    cache = PrefixCache(backbone)
    cache.get((1, 2))
    cache.save(tmp_path / "p")
    save_tiny_model(tmp_path / "other", "qwen2")
    with pytest.raises(gen_fast.PrefixCacheError, match="backbone"):
        PrefixCache(load_backbone(tmp_path / "other")).load(tmp_path / "p")
    with pytest.raises(gen_fast.PrefixCacheError, match="dtype"):
        PrefixCache(load_backbone(tiny_model, dtype=torch.bfloat16)).load(tmp_path / "p")


def test_damaged_cache(backbone, tmp_path):
    path = tmp_path / "p"
    cache = PrefixCache(backbone)
    cache.get((1, 2))
    cache.save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(gen_fast.PrefixCacheError, match="not a readable prefix cache"):
        cache.load(path)
