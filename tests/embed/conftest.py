"""What tests of embedding share."""

from typing import Any, NamedTuple

import pytest
from torch import Tensor

from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch


class Pass(NamedTuple):
    """What a forward pass was asked for, and how many states it gave for how many texts."""

    prefix: Any
    mask: str
    states: int
    texts: int


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The forward passes of backbones, as they come."""
    seen: list[Pass] = []
    forward = Backbone.forward

    def watched(self: Backbone, batch: PackedBatch, **options: Any) -> Tensor:
        states = forward(self, batch, **options)
        seen.append(Pass(options["prefix"], options["mask"], len(states), len(batch.lengths)))
        return states

    monkeypatch.setattr(Backbone, "forward", watched)
    return seen
