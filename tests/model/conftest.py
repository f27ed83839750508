"""What tests of the model share."""

from collections.abc import Callable, Hashable, Mapping

import numpy as np
import pytest
from torch import Tensor

from gen_fast.model.graphs import Graphs
from gen_fast.testing import no_host_sync


@pytest.fixture
def stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run as a graph fails if it could not be recorded on a GPU."""
    run = Graphs.run

    def checked(
        self: Graphs,
        key: Hashable,
        arrays: Mapping[str, np.ndarray],
        function: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> Tensor:
        def guarded(tensors: Mapping[str, Tensor]) -> Tensor:
            with no_host_sync():
                return function(tensors)

        return run(self, key, arrays, guarded)

    monkeypatch.setattr(Graphs, "run", checked)
