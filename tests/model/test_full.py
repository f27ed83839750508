"""Weights in training against those of transformers."""

import pytest
import torch
from oracles.lora import weight_gradients_of
from torch.nn.functional import cosine_similarity

from gen_fast.model.batch import PackedBatch
from gen_fast.model.full import FullWeights
from gen_fast.model.lora import linear_sizes
from gen_fast.model.tensor_files import find_tensors
from gen_fast.model.weights import load_backbone
from gen_fast.testing import relative_error, save_tiny_model

LENGTHS = (5, 1, 17, 8)


def texts():
    torch.manual_seed(1)
    return [torch.randint(3, 200, (n,)).numpy() for n in LENGTHS]


def weights_of(directory, backbone):
    full = FullWeights(backbone.config)
    files = find_tensors(directory)
    full.copy(lambda name, shape: files.get(f"{name}.weight", shape))
    return full


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen2", "qwen3"])
@pytest.mark.parametrize("recompute", [False, True])
def test_states_and_gradients_are_those_of_transformers(tmp_path, family, recompute):
    model = save_tiny_model(tmp_path, family)
    backbone = load_backbone(tmp_path)
    full = weights_of(tmp_path, backbone)
    with torch.no_grad():
        for matrix in full.matrices:
            matrix.add_(0.02 * torch.randn_like(matrix))
        for name, weight in full.weights().items():
            model.get_submodule(f"model.{name}").weight.copy_(weight)
    rows, keep = [], []
    model.model.norm.register_forward_pre_hook(lambda _, args: keep.append(args[0]))
    for ids in texts():
        model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
        rows.append(keep.pop()[0])
    expected = torch.cat(rows)
    torch.manual_seed(2)
    heads = torch.randn_like(expected)
    (expected * heads).sum().backward()
    batch = PackedBatch.pack(texts())
    actual = backbone.forward(batch, update=full, recompute=recompute)
    (actual * heads).sum().backward()
    assert relative_error(actual, expected) <= 1e-4
    for name, own in weight_gradients_of(full, backbone.config).items():
        other = model.get_submodule(f"model.{name}").weight.grad
        assert cosine_similarity(own.flatten(), other.flatten(), dim=0) >= 0.99999, name
        assert relative_error(own, other) <= 1e-4, name
    frozen = [t for layer in backbone.layers for t in vars(layer).values() if t is not None]
    assert all(t.grad is None for t in frozen)


def test_it_begins_by_changing_nothing_and_is_apart_from_the_base(tiny_model):
    backbone = load_backbone(tiny_model)
    full = weights_of(tiny_model, backbone)
    batch = PackedBatch.pack(texts())
    base = backbone.forward(batch)
    assert torch.equal(backbone.forward(batch, update=full), base)
    with torch.no_grad():
        full.matrices[0].add_(0.1)
    assert torch.equal(backbone.forward(batch), base)
    assert relative_error(backbone.forward(batch, update=full), base) > 1e-3
    assert {name: tuple(w.shape) for name, w in full.weights().items()} == linear_sizes(
        backbone.config
    )


def test_passes_in_bfloat16_share_one_copy_until_the_weights_change(tiny_model):
    backbone = load_backbone(tiny_model, dtype=torch.bfloat16)
    full = weights_of(tiny_model, backbone)
    first = full.cast(torch.bfloat16)
    assert full.cast(torch.bfloat16) is first
    batch = PackedBatch.pack(texts())
    backbone.forward(batch, update=full).float().square().sum().backward()
    assert all(m.grad.dtype == torch.float32 and m.grad.any() for m in full.matrices)
    torch.optim.AdamW(full.parameters(), lr=0.1).step()
    second = full.cast(torch.bfloat16)
    assert second is not first
    changed = backbone.forward(batch, update=full)
    assert relative_error(changed, backbone.forward(batch)) > 1e-2
    # In float32 the weights are multiplied by as they are.
    weight = full.cast(torch.float32)._weights[0, "qkv"][1]
    assert weight.data_ptr() == full.matrices[0].data_ptr()
