"""Errors by row, and the mode that fails on what would stop the host on a GPU."""

import numpy as np
import pytest
import torch

from gen_fast.model.batch import PackedBatch
from gen_fast.model.weights import load_backbone
from gen_fast.ops.pool import pool
from gen_fast.testing import TOLERANCE, HostSyncError, assert_no_worse, no_host_sync


@pytest.mark.parametrize(
    "stops",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: x.to("meta"),
        lambda x: torch.zeros(3)[x[0].long()],
    ],
)
def test_what_stops_the_host_is_refused(stops):
    x = torch.arange(3.0)
    with pytest.raises((HostSyncError, TypeError)) as caught, no_host_sync():
        stops(x)
    assert caught.type is HostSyncError


def test_what_does_not_stop_the_host_is_let_through():
    x = torch.arange(6.0).view(2, 3)
    with no_host_sync():
        y = (x @ x.T).softmax(-1).argmax(-1)
        assert len(x[y]) == 2
        x.copy_(x + 1, non_blocking=True)
        x.masked_fill(x > 2, 0).topk(2)
    x.sum().item()  # afterwards it is allowed


@torch.inference_mode()
def test_encoding_stops_nobody_between_the_batch_and_its_result(tiny_model):
    backbone = load_backbone(tiny_model, packed=True)
    prefix = backbone.prefill((4, 5, 6))
    batch = PackedBatch.pack([np.arange(3, 9), np.arange(20, 60)], needed=[1, 3], prefix_length=3)
    with no_host_sync():
        hidden = backbone.forward(batch, prefix=prefix)
        pooled = pool(hidden, batch.needed.cu_seqlens, backbone.final_norm, 1e-5)
    assert pooled.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cancelling", [False, True])
def test_one_bad_row_is_found(dtype, cancelling):
    torch.manual_seed(0)
    exact = torch.randn(40, 8, 64, dtype=torch.float64)
    exact[3, 2] *= 0.1
    reference = exact.to(dtype)
    assert_no_worse(reference.clone(), reference, exact, cancelling=cancelling)
    # Everywhere as much as is allowed in one element: the largest element is within its tolerance.
    bad = reference.clone()
    bad[3, 2] += (0.9 * TOLERANCE[dtype] * exact.abs().max()).to(dtype)
    with pytest.raises(AssertionError, match=r"1 of 320 rows, such as row 26: error"):
        assert_no_worse(bad, reference, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_zeros_must_be_one_unless_its_terms_cancel(dtype):
    torch.manual_seed(0)
    exact = torch.randn(40, 64, dtype=torch.float64)
    exact[7] = 0
    reference = exact.to(dtype)
    residue = reference.clone()
    residue[7] = torch.finfo(dtype).eps / 2
    with pytest.raises(AssertionError, match="such as row 7"):
        assert_no_worse(residue, reference, exact)
    assert_no_worse(residue, reference, exact, cancelling=True)
    residue[7] = 400 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError):
        assert_no_worse(residue, reference, exact, cancelling=True)


def test_an_element_that_nobody_wrote_is_found():
    exact = torch.ones(3, 4, dtype=torch.float64)
    bad = exact.float()
    bad[2, 1] = torch.nan
    with pytest.raises(AssertionError, match="error nan"):
        assert_no_worse(bad, exact.float(), exact)


def test_scalars_and_empty_tensors_have_no_rows():
    for exact in (
        torch.tensor(2.0).double(),
        torch.empty(0, 4).double(),
        torch.empty(4, 0).double(),
    ):
        assert_no_worse(exact.float(), exact.float(), exact)
