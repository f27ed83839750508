"""What torchrun says in the environment, on a machine whose GPUs are a number."""

import pytest
import torch
import torch.distributed as dist

from gen_fast.errors import ConfigError
from gen_fast.training.world import distributed


@pytest.fixture
def joined(monkeypatch):
    """What happens on a machine with four GPUs, as process `LOCAL_RANK` of eight."""
    steps = []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: steps.append(str(device)))
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *_, name=name: steps.append(name))
    return steps


@pytest.mark.parametrize("rank", range(4))
def test_each_process_has_its_own_gpu_before_it_joins(rank, joined, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with distributed():
        assert joined == [f"cuda:{rank}", "init_process_group"]


def test_more_processes_than_gpus_are_refused(joined, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "4")
    with (
        pytest.raises(ConfigError, match="process 5 of this machine, which has 4 GPUs"),
        distributed(),
    ):
        pass
    assert joined == []
