"""Masked next-token prediction: which tokens are hidden, and the loss."""

import numpy as np
import pytest
import torch

from gen_fast.model.lora import Lora, LoraConfig
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.testing import save_tiny_model
from gen_fast.training.backbone_pass import TrainedBackbone
from gen_fast.training.mntp import blocks, hide
from gen_fast.training.prediction import (
    PredictedText,
    cross_entropy,
    evaluate_prediction,
    predicted_states,
    right,
)

SPECIAL = np.array([1, 2])


def hidden(ids, masking="bert", probability=0.2, seed=0):
    return hide(
        ids,
        key=0,
        probability=probability,
        masking=masking,
        mask_id=7,
        vocabulary=500,
        special=SPECIAL,
        draws=np.random.default_rng(seed),
    )


def test_blocks_are_whole_and_in_order():
    rows = [np.arange(5), np.arange(5, 9), np.arange(9, 12)]
    assert [block.tolist() for block in blocks(rows, 5)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert blocks([], 5) == [] == blocks([np.arange(3)], 5)


def test_bert_masking_hides_replaces_and_leaves():
    ids = np.random.default_rng(1).integers(10, 500, 100_000)
    text = hidden(ids)
    n = len(text.places)
    assert n / len(ids) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / len(ids)) ** 0.5)
    assert np.array_equal(text.targets, ids[text.places])
    told = text.ids[text.places]
    for share, found in ((0.8, told == 7), (0.1, told == text.targets)):
        assert found.mean() == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5 + 2e-3)
    untouched = np.delete(np.arange(len(ids)), [0, *text.places])
    assert np.array_equal(text.ids[untouched], ids[untouched])


def test_always_masking_hides_all_and_no_special_token_is_hidden():
    ids = np.tile(np.array([1, 30, 31, 2]), 1000)
    text = hidden(ids, "always", probability=0.8)
    assert (text.ids[text.places] == 7).all()
    assert (text.ids[::4] == 1).all()
    assert (text.ids[3::4] == 2).all()
    assert hidden(np.array([30, 1, 2]), "always", probability=1.0).places.tolist() == []


def test_the_same_seed_hides_the_same():
    ids = np.arange(10, 400)
    first, again, other = hidden(ids), hidden(ids), hidden(ids, seed=1)
    assert np.array_equal(first.ids, again.ids)
    assert not np.array_equal(first.places, other.places)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2-window", "qwen3"])
def test_the_loss_is_that_of_plain_transformers(tmp_path, family):
    model = save_tiny_model(tmp_path, family)
    backbone = load_backbone(tmp_path)
    rng = np.random.default_rng(0)
    texts = [hidden(rng.integers(10, 200, n), seed=n) for n in (12, 40, 33)]
    vocabulary = backbone.config.vocab_size
    texts = [PredictedText(t.ids % vocabulary, t.places, t.targets, t.key) for t in texts]
    tokens = sum(len(t.places) for t in texts)
    terms, correct = [], 0
    for text in texts:
        n = len(text.ids)
        with torch.no_grad():
            logits = model(
                input_ids=torch.from_numpy(text.ids)[None],
                attention_mask=torch.zeros(1, 1, n, n),
                use_cache=False,
            ).logits[0, text.places - 1]
        targets = torch.from_numpy(text.targets)
        terms.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        correct += int((logits.argmax(-1) == targets).sum())
    expected = float(torch.stack(terms).sum() / tokens)
    lora = Lora(LoraConfig(rank=2, dropout=0.0), backbone.config)
    trained = TrainedBackbone(backbone, lora, mask="bidirectional")
    states, targets = predicted_states(trained, texts, None)
    head = load_head(tmp_path, backbone)
    assert float(cross_entropy(states, head, targets, tokens)) == pytest.approx(expected, rel=1e-5)
    assert right(states, head, targets) == correct
    figures = evaluate_prediction(trained, head, texts, part_tokens=50)
    assert figures["loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["accuracy"] == correct / tokens
