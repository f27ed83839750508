"""The processes of a run, as torchrun starts them."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gen_fast.model.device import device_of_rank, make_current

Item = TypeVar("Item")

# Of gradients that are summed at once: few messages for LoRA, a small copy beside full weights.
_MESSAGE = 256 << 20


def processes_started() -> int:
    """How many ranks torchrun has started, whether or not they have found each other; else 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def distributed() -> Iterator[None]:
    """Join the process group that torchrun describes in the environment, if it does.

    Each process has a GPU of its own where there are GPUs. Raises ConfigError where there are fewer
    than processes.
    """
    if processes_started() == 1:
        yield
        return
    if torch.cuda.is_available():
        gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        make_current(device_of_rank(int(os.environ["LOCAL_RANK"]), gpus))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield
        # Together: a rank that leaves while another still works may be aborted in its threads.
        dist.barrier()
    finally:
        dist.destroy_process_group()


class World:
    """The ranks of a run; a single process is a world of one."""

    def __init__(self) -> None:
        initialized = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if initialized else 0
        self.size = dist.get_world_size() if initialized else 1

    def sum(self, values: Tensor) -> Tensor:
        """Sum of `values` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Sequence[Tensor], numbers: Tensor) -> Tensor:
        """Sum the gradients of `parameters` over the ranks, in place, and `numbers` [n] with them.

        In messages of about _MESSAGE bytes; a parameter without a gradient gets one.
        """
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        numbers = numbers.to(gradients[0], copy=True)
        if self.size > 1:
            for tensors in _messages([*gradients, numbers]):
                flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
                for tensor, part in zip(
                    tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
                ):
                    tensor.copy_(part.view_as(tensor))
        return numbers

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the values that the first has."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def gather(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Rows of all ranks [sum(counts), d], in rank order; this rank's has `counts[rank]`."""
        if self.size == 1:
            return values
        widest = max(counts)
        padded = values.new_zeros(widest, *values.shape[1:])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def share(self, items: Sequence[Item], work: Sequence[int]) -> list[Item]:
        """This rank's items of a global batch: dealt by their work, so that ranks have equal."""
        order = sorted(range(len(items)), key=lambda i: work[i], reverse=True)
        rounds = np.arange(len(order)) // self.size
        seats = np.arange(len(order)) % self.size
        # Back and forth, as teams are picked: else the first rank gets the longest of each round.
        dealt = np.where(rounds % 2 == 0, seats, self.size - 1 - seats)
        return [items[i] for i, seat in zip(order, dealt, strict=True) if seat == self.rank]

    def counts(self, own: int) -> list[int]:
        """`own` of every rank."""
        if self.size == 1:
            return [own]
        values = torch.zeros(self.size, dtype=torch.int64, device=self._device())
        values[self.rank] = own
        return [int(count) for count in self.sum(values)]

    def _device(self) -> str:
        return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _messages(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, in parts of at most _MESSAGE bytes, or of one larger tensor."""
    part: list[Tensor] = []
    for tensor in tensors:
        if part and sum(x.nbytes for x in part) + tensor.nbytes > _MESSAGE:
            yield part
            part = []
        part.append(tensor)
    yield part
