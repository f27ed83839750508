"""The single items that a score is made of: its standard error, and paired comparisons by them.

A difference between two methods on the same items is much surer than the two scores' own standard
errors suggest, because easy items are easy for both: compare with `difference`, not by error bars.
Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from gen_fast.errors import InputError

RESAMPLES = 1000


def _mean(values: np.ndarray, gold: np.ndarray) -> float:
    return float(values.mean())


def _spearman(values: np.ndarray, gold: np.ndarray) -> float:
    if not np.ptp(values) or not np.ptp(gold):  # a resample of few items
        return float("nan")
    return float(spearmanr(values, gold).statistic)


def _average_precision(values: np.ndarray, gold: np.ndarray) -> float:
    return float(average_precision_score(gold, values)) if gold.any() else float("nan")


# How items become a score. "draws" are scores of resamples already, as clustering gives them.
STATISTICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mean": _mean,
    "draws": _mean,
    "spearman": _spearman,
    "average-precision": _average_precision,
}


@dataclass(frozen=True)
class Items:
    """What a score was computed from.

    statistic: of STATISTICS. values [n]: scores of queries or texts for "mean", similarities of
    pairs for "spearman" and "average-precision". gold [n]: what those should follow; unused by the
    others. ids: of the items, in their order.
    """

    statistic: str
    ids: tuple[str, ...]
    values: np.ndarray
    gold: np.ndarray

    @property
    def score(self) -> float:
        """The score itself."""
        return STATISTICS[self.statistic](self.values, self.gold)

    def standard_error(self) -> float:
        """Of the score, over the choice of items; by the bootstrap where there is no formula."""
        if self.statistic == "draws":
            return float(self.values.std())
        if self.statistic == "mean":
            return float(self.values.std(ddof=1) / len(self.values) ** 0.5)
        return float(np.nanstd([self._resampled(rows) for rows in _resamples(len(self.values))]))

    def _resampled(self, rows: np.ndarray) -> float:
        gold = self.gold[rows] if len(self.gold) else self.gold
        return STATISTICS[self.statistic](self.values[rows], gold)

    def as_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return {
            "statistic": self.statistic,
            "ids": list(self.ids),
            "values": [round(float(value), 6) for value in self.values],
            "gold": [float(value) for value in self.gold],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Items":
        """What `as_json` gave."""
        return cls(
            data["statistic"],
            tuple(data["ids"]),
            np.array(data["values"], dtype=np.float64),
            np.array(data["gold"], dtype=np.float64),
        )


@dataclass(frozen=True)
class Difference:
    """Score of one method less that of another: the value, and its 95 % interval low … high."""

    value: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def difference(a: Items, b: Items) -> Difference:
    """Score of `a` less that of `b` on the same items, with a paired bootstrap interval.

    Raises InputError if the items are not the same.
    """
    if a.statistic != b.statistic or a.ids != b.ids:
        raise InputError("scores of different items cannot be compared in pairs")
    if a.statistic == "draws":  # each draw is of the same texts for both
        draws = a.values - b.values
    else:
        rows = _resamples(len(a.values))
        draws = np.array([a._resampled(row) - b._resampled(row) for row in rows])
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Difference(a.score - b.score, float(low), float(high))


def _resamples(count: int) -> np.ndarray:
    """Rows of each resample: [RESAMPLES, count], the same for every score of as many items."""
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
