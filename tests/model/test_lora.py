"""LoRA over the backbone, against PEFT's own."""

import numpy as np
import pytest
import torch
from oracles.lora import gradients_of
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch.nn.functional import cosine_similarity

from gen_fast.errors import AdapterError, ConfigError
from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch
from gen_fast.model.dropout import RowDropout
from gen_fast.model.linear import can_pack
from gen_fast.model.lora import MATRICES, MODULES, Lora, LoraConfig, linear_sizes
from gen_fast.model.update import FrozenLinear
from gen_fast.model.weights import load_backbone
from gen_fast.ops.dropout import dropout
from gen_fast.testing import relative_error, save_tiny_model

LENGTHS = [1, 17, 40, 9]
CONFIG = LoraConfig(rank=4, alpha=6, dropout=0.0)


def peft_name(name: str, letter: str) -> str:
    return f"base_model.model.model.{name}.lora_{letter}.default.weight"


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral-window"])
def models(request, tmp_path_factory):
    """PEFT's model with random factors, our backbone, and our factors: the same numbers."""
    directory = tmp_path_factory.mktemp("lora")
    base = save_tiny_model(directory, request.param)
    peft = get_peft_model(
        base,
        PeftConfig(
            r=4, lora_alpha=6, lora_dropout=0.0, target_modules=list(MODULES), task_type="CAUSAL_LM"
        ),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    backbone = load_backbone(directory)
    return peft, backbone, factors_of(peft, backbone)


def factors_of(peft, backbone: Backbone) -> Lora:
    parameters = dict(peft.named_parameters())
    names = Lora(CONFIG, backbone.config).names
    factors = {n: tuple(parameters[peft_name(n, letter)] for letter in "AB") for n in names}
    return Lora.from_factors(CONFIG, backbone.config, factors)


def texts_of(backbone: Backbone) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, backbone.config.vocab_size, n) for n in LENGTHS]


def peft_states(peft, ids, mask):
    """States before the final norm [T, h], with gradient."""
    rows, keep = [], []
    hook = peft.base_model.model.model.norm.register_forward_pre_hook(
        lambda _, args: keep.append(args[0])
    )
    for row in ids:
        seen = torch.zeros(1, 1, len(row), len(row)) if mask == "bidirectional" else None
        peft(input_ids=torch.from_numpy(row)[None], attention_mask=seen, use_cache=False)
        rows.append(keep.pop()[0])
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
@pytest.mark.parametrize("recompute", [False, True])
def test_states_and_gradients_equal_pefts(models, mask, recompute):
    peft, backbone, lora = models
    ids = texts_of(backbone)
    expected = peft_states(peft, ids, mask)
    torch.manual_seed(2)
    weights = torch.randn_like(expected)
    peft.zero_grad()
    (expected * weights).sum().backward()
    lora.zero_grad()
    actual = backbone.forward(PackedBatch.pack(ids), mask=mask, update=lora, recompute=recompute)
    (actual * weights).sum().backward()
    assert relative_error(actual, expected) <= 1e-4
    parameters = dict(peft.named_parameters())
    for name, pair in gradients_of(lora, backbone.config).items():
        for letter, own in zip("AB", pair, strict=True):
            other = parameters[peft_name(name, letter)].grad
            cosine = cosine_similarity(own.flatten(), other.flatten(), dim=0)
            assert cosine >= 0.99999, (name, letter)
            assert relative_error(own, other) <= 1e-4, (name, letter)
    assert all(
        t.grad is None for layer in backbone.layers for t in vars(layer).values() if t is not None
    )


def test_a_packed_backbone_trains_to_the_same_gradients(tiny_model):
    plain = load_backbone(tiny_model)
    if not can_pack(plain.layers[0].qkv):
        pytest.skip("not on this processor")
    packed = load_backbone(tiny_model, packed=True)
    ids = texts_of(plain)
    gradients = []
    for backbone in (plain, packed):
        lora = Lora(CONFIG, backbone.config, seed=3)
        torch.manual_seed(0)
        with torch.no_grad():
            for b in lora.b:
                b.normal_()
        batch = PackedBatch.pack(ids, needed=[1, 3, 4, 0])
        backbone.forward(batch, mask="bidirectional", update=lora).square().sum().backward()
        gradients.append([p.grad for p in lora.parameters()])
    for own, other in zip(*gradients, strict=True):
        assert relative_error(own, other) <= 1e-5


def test_it_begins_by_changing_nothing_and_the_same_each_time(tiny_model):
    backbone = load_backbone(tiny_model)
    batch = PackedBatch.pack(texts_of(backbone))
    lora = Lora(CONFIG, backbone.config, seed=5)
    assert torch.equal(backbone.forward(batch, update=lora), backbone.forward(batch))
    again = Lora(CONFIG, backbone.config, seed=5)
    assert all(map(torch.equal, lora.parameters(), again.parameters()))


def test_some_modules_alone_and_factors_that_do_not_fit(tiny_model):
    config = load_backbone(tiny_model).config
    some = Lora(LoraConfig(rank=2, modules=("v_proj", "down_proj")), config)
    assert some.names[:2] == ("layers.0.self_attn.v_proj", "layers.0.mlp.down_proj")
    with pytest.raises(AdapterError, match="updated on one side only"):
        some.copy_factors(Lora(LoraConfig(rank=2), config).factors())
    with pytest.raises(AdapterError, match="A has shape"):
        some.copy_factors(
            Lora(LoraConfig(rank=3, modules=("v_proj", "down_proj")), config).factors()
        )
    with pytest.raises(ConfigError, match="modules must be some of"):
        LoraConfig(modules=("lm_head",))


def test_recomputation_keeps_only_what_goes_between_layers(tiny_model):
    backbone = load_backbone(tiny_model)
    lora = Lora(CONFIG, backbone.config)
    batch = PackedBatch.pack(texts_of(backbone))
    sizes = []
    for recompute in (False, True):
        saved: dict[int, int] = {}

        def keep(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            backbone.forward(batch, update=lora, recompute=recompute)
        sizes.append(sum(saved.values()))
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("matrix", ["qkv", "down"])
def test_dropped_inputs_and_their_gradients_are_those_of_autograd(tiny_model, matrix):
    config = load_backbone(tiny_model).config
    lora = Lora(LoraConfig(rank=3, dropout=0.4), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for b in lora.b:
            b.normal_()
    sizes = [linear_sizes(config)[f"layers.1.{part}"] for part in MATRICES[matrix]]
    weight = torch.randn(sum(out for out, _ in sizes), sizes[0][1])
    x = torch.randn(11, sizes[0][1], requires_grad=True)
    drop = RowDropout(0.4, 9, torch.arange(11) // 4, torch.arange(11) % 4)
    grad = torch.randn(11, len(weight))
    frozen = FrozenLinear(1, matrix, weight, None)
    lora.cast(torch.float32).linear(x, frozen, drop).backward(grad)
    found = [x.grad, *(p.grad for p in lora.parameters() if p.grad is not None)]

    factors = [lora.factors()[f"layers.1.{part}"] for part in MATRICES[matrix]]
    stacked = map(torch.cat, zip(*factors, strict=True))
    leaves = [t.clone().requires_grad_() for t in (x.detach(), *stacked)]
    plain, down, up = leaves
    ups = up.split([rows for rows, _ in sizes])
    streams = [7 + MODULES.index(part.split(".")[1]) for part in MATRICES[matrix]]
    updates = [
        lora.config.scale * dropout(plain, *drop.settings, stream) @ a.T @ b.T
        for stream, a, b in zip(streams, down.split(3), ups, strict=True)
    ]
    (plain @ weight.T + torch.cat(updates, 1)).backward(grad)
    for own, leaf in zip(found, leaves, strict=True):
        assert relative_error(own, leaf.grad) <= 1e-5
    sums = {float(dropout(x.detach(), *drop.settings, stream).sum()) for stream in streams}
    assert len(sums) == len(streams)
