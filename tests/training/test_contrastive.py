"""SimCSE's and the supervised loss, with and without gradient caching."""

import numpy as np
import pytest
import torch

from gen_fast.model.lora import Lora, LoraConfig
from gen_fast.model.weights import load_backbone
from gen_fast.testing import relative_error
from gen_fast.training.backbone_pass import TrainedBackbone
from gen_fast.training.contrastive import Match, View, accumulate_contrastive, embed, infonce
from gen_fast.training.world import World


@pytest.mark.parametrize("negatives", [False, True])
def test_the_loss_is_that_of_sentence_transformers(negatives):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    torch.manual_seed(0)
    rows = [torch.randn(17, 24, dtype=torch.float64) for _ in range(3 if negatives else 2)]
    peer = MultipleNegativesRankingLoss(model=None, scale=20.0)
    expected = peer.compute_loss_from_embeddings(rows, None)
    own = infonce(dict(zip(("anchor", "positive", "negative"), rows, strict=False)), 20.0)
    assert float(own) == pytest.approx(float(expected), rel=1e-6)


def setup(tiny_model, *, attention_dropout=0.3, dropout=0.1, recompute=False):
    backbone = load_backbone(tiny_model)
    lora = Lora(LoraConfig(rank=4, dropout=dropout), backbone.config, seed=1)
    torch.manual_seed(3)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(std=0.3)
    return TrainedBackbone(
        backbone,
        lora,
        mask="bidirectional",
        attention_dropout=attention_dropout,
        recompute=recompute,
    )


def matches(count, views=2):
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        rows = [rng.integers(3, 200, rng.integers(2, 30)) for _ in range(views)]
        made.append(Match(*(View(ids, len(ids) - 1, 3 * i + j) for j, ids in enumerate(rows))))
    return made


def gradients(trained, batch, part_tokens, seed=5):
    for parameter in trained.parameters:
        parameter.grad = None
    loss = accumulate_contrastive(
        trained, batch, World(), scale=20.0, seed=seed, part_tokens=part_tokens
    )
    return float(loss), [p.grad.clone() for p in trained.parameters]


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_caching_and_recomputation_change_nothing(tiny_model, views, recompute):
    """Also with dropout: the second pass sees what the first one saw."""
    batch = matches(9, views)
    whole, expected = gradients(setup(tiny_model), batch, None)
    cached, found = gradients(setup(tiny_model, recompute=recompute), batch, 60)
    assert cached == pytest.approx(whole, rel=1e-5)
    for own, other in zip(found, expected, strict=True):
        assert relative_error(own, other) <= 1e-5
    without, _ = gradients(setup(tiny_model, attention_dropout=0, dropout=0), batch, None)
    assert without != pytest.approx(whole, rel=1e-4)


def test_a_batch_of_a_few_parts_is_run_once(tiny_model, monkeypatch):
    batch = matches(9)
    trained = setup(tiny_model)
    whole, expected = gradients(trained, batch, None)
    tokens = sum(match.tokens for match in batch)
    run = []
    states = TrainedBackbone.states

    def counted(self, texts, *rest):
        run.append(sum(map(len, texts)))
        return states(self, texts, *rest)

    monkeypatch.setattr(TrainedBackbone, "states", counted)
    trained.budget.tokens = tokens // 3
    found_loss, found = gradients(trained, batch, None)
    assert len(run) > 2
    assert sum(run) == tokens
    assert found_loss == pytest.approx(whole, rel=1e-5)
    for own, other in zip(found, expected, strict=True):
        assert relative_error(own, other) <= 1e-5
    run.clear()
    gradients(trained, batch, tokens // 3)  # asked for no more than that at a time
    assert sum(run) == 2 * tokens


def test_two_views_of_a_text_differ_by_dropout_alone(tiny_model):
    trained = setup(tiny_model)
    ids = np.arange(3, 20)
    views = [View(ids, 17, key) for key in (0, 1, 0)]
    dropped = embed(trained, views, 5)
    assert relative_error(dropped[2], dropped[0]) <= 1e-5
    assert relative_error(dropped[1], dropped[0]) > 1e-2
    other_seed = embed(trained, views, 6)
    assert relative_error(other_seed[0], dropped[0]) > 1e-2
    plain = embed(trained, views, None)
    assert relative_error(plain[1], plain[0]) <= 1e-6


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_that_runs_out_of_memory_is_cached(tiny_model, monkeypatch, where):
    batch = matches(9)
    trained = setup(tiny_model)
    whole, expected = gradients(trained, batch, None)
    tokens = sum(match.tokens for match in batch)
    states = TrainedBackbone.states

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def too_large(self, texts, *rest):
        if sum(map(len, texts)) <= tokens // 2 or not torch.is_grad_enabled():
            return states(self, texts, *rest)
        if where == "forward":
            fail()
        result = states(self, texts, *rest)
        result.register_hook(fail)
        return result

    monkeypatch.setattr(TrainedBackbone, "states", too_large)
    found_loss, found = gradients(trained, batch, None)
    assert found_loss == pytest.approx(whole, rel=1e-5)
    for own, other in zip(found, expected, strict=True):
        assert relative_error(own, other) <= 1e-5
