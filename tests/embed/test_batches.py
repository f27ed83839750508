"""Batches that are launched before the one before is done, as on a GPU."""

import numpy as np
import pytest
import torch

from gen_fast.embed.batches import Batch, run_batches
from gen_fast.embed.windows import window_bounds
from gen_fast.model.stream_choice import StreamChooser
from gen_fast.model.token_budget import TokenBudget
from gen_fast.model.weights import load_backbone

NO_MEMORY = "CUDA error: out of memory"


@pytest.fixture
def run_all(tiny_model):
    """run_all(run): what comes of five batches of two texts, one in flight."""
    backbone = load_backbone(tiny_model)
    members = np.arange(10).reshape(5, 2)
    batches = [Batch(pair, np.array([50, 40]), None) for pair in members]

    def all_of(run):
        chooser = StreamChooser(backbone, 1, 64)
        return run_batches(batches, run, TokenBudget(backbone), chooser, in_flight=True)

    return all_of


def test_the_next_batch_is_launched_before_a_result_is_given(run_all):
    launched, given = [], []

    def run(batch):
        launched.append(batch.members[0])
        return torch.from_numpy(batch.members * 10)

    for members, result in run_all(run):
        given.append(members[0])
        assert result.tolist() == (10 * members).tolist()
        assert launched == list(range(0, min(10, 2 * len(given) + 2), 2))
    assert given == [0, 2, 4, 6, 8]


def test_the_first_error_in_order_is_raised(run_all):
    def run(batch):
        if batch.members[0] >= 4:
            raise RuntimeError(f"of batch {batch.members[0]}")
        return torch.from_numpy(batch.members)

    given = []
    with pytest.raises(RuntimeError, match="of batch 4"):
        given.extend(members[0] for members, _ in run_all(run))
    assert given == [0, 2]


def test_a_batch_that_does_not_fit_is_run_in_parts(run_all):
    def run(batch):
        if batch.members[0] == 4 and len(batch.members) > 1:
            raise RuntimeError(NO_MEMORY)
        return torch.from_numpy(batch.members)

    results = [result for _, result in run_all(run)]
    assert sorted(torch.cat(results).tolist()) == list(range(10))
    assert max(len(result) for result in results[-2:]) == 1


def test_the_first_window_may_be_smaller():
    bounds = list(window_bounds(["a"] * 9000, 256))
    assert bounds == [slice(0, 256), slice(256, 4352), slice(4352, 8448), slice(8448, 9000)]
    assert list(window_bounds(["a"] * 100, 256)) == [slice(0, 100)]
    assert list(window_bounds(["a"] * 5000)) == [slice(0, 4096), slice(4096, 5000)]
