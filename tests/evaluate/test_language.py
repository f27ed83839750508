"""KL and perplexity of packed texts against transformers, one text at a time."""

import math

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.evaluate import language
from gen_fast.evaluate.language import (
    LanguageModel,
    ScoredText,
    answer_texts,
    drift,
    running_texts,
)
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.testing import save_tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_drift_equals_transformers(tmp_path, monkeypatch, family):
    models, sides = [], []
    for seed in range(2):
        folder = tmp_path / str(seed)
        models.append(save_tiny_model(folder, family, seed=seed))
        backbone = load_backbone(folder)
        sides.append(LanguageModel(backbone, load_head(folder, backbone)))
    rng = np.random.default_rng(0)
    lengths, counts = (5, 40, 2, 17), (4, 9, 1, 16)
    ids = [rng.integers(0, 200, n) for n in lengths]
    texts = [ScoredText(row, count) for row, count in zip(ids, counts, strict=True)]
    monkeypatch.setattr(language, "LOGITS_BYTES", 4 * 7 * len(sides[0].head))
    monkeypatch.setattr(language, "CPU_TOKENS", 20)
    actual = drift(*sides, texts)

    kl, losses, same = [], ([], []), []
    for row, count in zip(ids, counts, strict=True):
        with torch.no_grad():
            told = [
                m(torch.from_numpy(row)[None]).logits[0, -count - 1 : -1].double().log_softmax(-1)
                for m in models
            ]
        kl.append(torch.nn.functional.kl_div(told[1], told[0], log_target=True, reduction="sum"))
        targets = torch.from_numpy(row[-count:])
        for side, log_p in zip(losses, told, strict=True):
            side.append(torch.nn.functional.nll_loss(log_p, targets, reduction="sum"))
        same.append((told[0].argmax(-1) == told[1].argmax(-1)).sum())
    tokens = sum(counts)
    expected = [float(sum(x)) / tokens for x in (kl, *losses, same)]
    assert actual.tokens == tokens
    assert [actual.kl, actual.base_loss, actual.model_loss, actual.agreement] == pytest.approx(
        expected, rel=1e-5
    )
    assert actual.perplexities[1] == pytest.approx(math.exp(expected[2]), rel=1e-5)
    unmoved = drift(sides[0], sides[0], texts)
    assert (unmoved.kl, unmoved.agreement) == (0.0, 1.0)


def test_texts_are_cut_to_the_tokens_that_are_asked_for():
    prompts = [(np.arange(3), np.arange(10, 15)), (np.arange(2), np.arange(0)), (np.arange(4),) * 2]
    texts = answer_texts(prompts, 7)
    assert [(len(t.ids), t.counted) for t in texts] == [(8, 5), (6, 2)]
    assert texts[1].ids.tolist() == [0, 1, 2, 3, 0, 1]
    pieces = running_texts([np.arange(10), np.arange(1), np.arange(20, 27)], 4, 9)
    assert [t.ids.tolist() for t in pieces] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
        [20, 21, 22],
    ]
    assert sum(t.counted for t in pieces) == 9
    with pytest.raises(gen_fast.ConfigError, match="no token to score"):
        drift(None, None, [])
