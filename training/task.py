"""What a run trains, for the one loop in trainer.py."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import split_by_budget
from gen_fast.model.token_budget import TokenBudget
from gen_fast.training.config import RunConfig
from gen_fast.training.records import Rejections
from gen_fast.training.world import World

T = TypeVar("T")
Example = TypeVar("Example")


@dataclass(frozen=True)
class Progress:
    """What a step has come to.

    losses: means of the global batch by name, and their weighted sum as "total". tokens: that this
    rank ran. flops: of its products with frozen weights and the head.
    """

    losses: Mapping[str, float]
    tokens: int
    flops: float


class Task(ABC, Generic[Example]):
    """One method's data, parameters, losses and files.

    config: the run's settings, with the learning rate that is taken. backbone: frozen. parameters:
    the module whose parameters are trained, the same on every rank. rejections: rows of the data
    that were left out.
    """

    config: RunConfig
    backbone: Backbone
    parameters: nn.Module
    rejections: Rejections

    @abstractmethod
    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """The trained parameters by learning rate; the first rate is the one reported."""

    def rate_scale(self, step: int) -> float:
        """What the schedule's learning rates are multiplied by in a step, counted from 0."""
        return 1.0

    def constrain(self) -> None:
        """Bring the parameters back to where they may be, after an update."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What, besides settings and backbone, must agree when a run is continued."""

    def begin(self) -> None:
        """Prepare the parameters of a run that begins."""

    @abstractmethod
    def examples(self, step: int, world: World) -> Sequence[Example]:
        """This rank's share of the global batch of a step, counted from 0."""

    @abstractmethod
    def accumulate(self, examples: Sequence[Example], world: World) -> Progress:
        """Put the gradients of the global batch's mean loss into the parameters of every rank."""

    @abstractmethod
    def validate(self) -> Mapping[str, float]:
        """Figures of the held-out rows, computed on one rank; empty if there are none."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the trained tensors as the encoder loads them."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Take over what `save` has written. Raises AdapterError."""

    @abstractmethod
    def finish(self, folder: Path, step: int) -> None:
        """Write the result of a run of `step` steps, with its model card."""


def in_parts(
    lengths: Sequence[int], budget: TokenBudget, limit: int | None, run: Callable[[slice], T]
) -> Iterator[T]:
    """`run` of each part of a batch of texts of these lengths, as much at a time as memory allows.

    limit: tokens of a part; None fits the device. A part that memory does not suffice for is tried
    again with half as many tokens: `run` must have changed nothing when it fails.
    """
    start = 0
    while start < len(lengths):
        count = next(split_by_budget(lengths[start:], budget.limit(limit))).stop
        part = slice(start, start + count)
        try:
            result = run(part)
        except RuntimeError as error:  # only running out of memory is survived
            budget.shrink(error, sum(lengths[part]), count)
            continue
        start = part.stop
        yield result
        del result  # of all weights it has gigabytes, while the next is computed


def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add to the gradients of the parameters."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
