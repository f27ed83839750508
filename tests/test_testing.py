"""The mode that fails on what would stop the host on a GPU."""

import numpy as np
import pytest
import torch

from gen_fast.model.batch import PackedBatch
from gen_fast.model.weights import load_backbone
from gen_fast.ops.pool import pool
from gen_fast.testing import HostSyncError, no_host_sync


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
