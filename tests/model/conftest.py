"""What tests of the model share."""

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from gen_fast.model.graphs import Graphs
from gen_fast.testing import WHOLE_BLOCKS, no_host_sync, save_tiny_model


@pytest.fixture(scope="session", params=["llama", "mistral-window", "qwen2", "qwen3"])
def quantizable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a family, whose linears consist of whole blocks; not to be changed."""
    folder = tmp_path_factory.mktemp("quantizable")
    save_tiny_model(folder, request.param, **WHOLE_BLOCKS)
    return folder


@pytest.fixture(scope="session")
def quantizable_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the tied head of a Llama."""
    folder = tmp_path_factory.mktemp("quantizable") / "llama"
    save_tiny_model(folder, "llama-tied", **WHOLE_BLOCKS)
    return folder


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
