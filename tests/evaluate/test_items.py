"""Standard errors and paired comparisons."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from gen_fast.errors import InputError
from gen_fast.evaluate.items import Items, difference


def items(statistic, values, gold=()):
    ids = tuple(map(str, range(len(values))))
    return Items(statistic, ids, np.asarray(values, dtype=float), np.asarray(gold, dtype=float))


def test_a_mean_has_the_standard_error_of_the_formula():
    values = np.random.default_rng(1).random(400)
    made = items("mean", values)
    assert made.score == pytest.approx(values.mean())
    assert made.standard_error() == pytest.approx(values.std(ddof=1) / 20)


def test_other_statistics_are_those_of_scipy_and_sklearn():
    rng = np.random.default_rng(2)
    values, gold = rng.random(300), rng.integers(0, 2, 300)
    assert items("spearman", values, gold).score == spearmanr(values, gold).statistic
    precision = items("average-precision", values, gold)
    assert precision.score == average_precision_score(gold, values)


def test_the_bootstrap_finds_the_standard_error_of_a_correlation():
    """Of independent values it is 1/√(n-1)."""
    rng = np.random.default_rng(3)
    made = items("spearman", rng.random(400), rng.random(400))
    assert made.standard_error() == pytest.approx(399**-0.5, rel=0.1)


def test_draws_are_resamples_already():
    assert items("draws", [0.1, 0.3]).standard_error() == pytest.approx(0.1)
    found = difference(items("draws", [0.5, 0.7, 0.6]), items("draws", [0.4, 0.6, 0.5]))
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_a_pair_is_compared_item_by_item():
    """Scores that differ a little on each item differ surely, however far the items spread."""
    values = np.random.default_rng(4).random(200)
    better = items("mean", values + 0.01)
    found = difference(better, items("mean", values))
    assert (found.value, found.low, found.high) == pytest.approx((0.01, 0.01, 0.01))
    assert found.significant
    assert better.standard_error() > 0.01


def test_no_difference_is_not_significant():
    rng = np.random.default_rng(5)
    found = difference(items("mean", rng.random(200)), items("mean", rng.random(200)))
    assert found.low < 0 < found.high
    assert not found.significant


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(200):
        a, b = rng.normal(0.3, 1, 60), rng.normal(0, 1, 60)
        found = difference(items("mean", a), items("mean", b))
        covered += found.low < 0.3 < found.high
    assert 178 <= covered <= 200  # 95 %, within 3.5 standard errors


def test_other_items_are_refused():
    with pytest.raises(InputError, match="different items"):
        difference(items("mean", [1.0, 0.0]), items("mean", [1.0, 0.0, 1.0]))
    with pytest.raises(InputError, match="different items"):
        difference(items("mean", [1.0, 0.0]), items("draws", [1.0, 0.0]))


def test_json_keeps_everything():
    made = items("spearman", [0.25, 0.5, 0.125], [1, 3, 2])
    again = Items.from_json(json.loads(json.dumps(made.as_json())))
    assert again.ids == made.ids
    assert again.score == made.score
