"""One training step: losses and gradients of a batch, exact whatever its parts.

The special tokens of all texts are run once. Reconstruction, which needs most of the memory, goes
over parts of the batch; each leaves its gradient at the soft prompts, and one pass takes the sum
back through the special tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.batch import on_device
from gen_fast.ops.distill import alignment, distill, reconstruction
from gen_fast.training import losses
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Example
from gen_fast.training.student import Student
from gen_fast.training.task import in_parts
from gen_fast.training.world import World

T = TypeVar("T")

# Bytes of logits at a time, on a CPU: twice the op's own. The head's products are the faster the
# more rows they have, but glibc gives what is larger than 32 MiB back to the system every time, and
# page faults then cost what more rows gain.
CPU_LOGITS = 31 << 20


@dataclass(frozen=True)
class Losses:
    """Mean losses of a global batch; those that are off are 0. total is their weighted sum."""

    total: float = 0.0
    reconstruction: float = 0.0
    alignment: float = 0.0
    repeat: float = 0.0
    negative: float = 0.0
    margin: float = 0.0
    contrastive: float = 0.0


@dataclass(frozen=True)
class Work:
    """Tokens that a step ran: queries forward only, the others forward and back."""

    queries: int
    specials: int
    answers: int
    predicted: int

    @property
    def tokens(self) -> int:
        """All tokens that were run."""
        return self.queries + self.specials + self.answers

    def flops(self, student: Student) -> float:
        """Floating-point operations of the products with frozen weights.

        2 for each weight and token forward, as many for the gradient of the input; the head twice
        for each predicted token (logits, gradient).
        """
        weights = student.backbone.config.non_embedding_parameters
        head = student.head.numel()
        return 2.0 * (
            weights * (self.queries + 2 * self.specials + 2 * self.answers)
            + 2 * head * self.predicted
        )


def accumulate(
    student: Student, examples: Sequence[Example], config: TrainConfig, world: World
) -> tuple[Losses, Work]:
    """Put the gradients of a global batch's mean loss into the student's parameters.

    examples: this rank's, at least one. Gradients and losses are summed over the ranks, each
    divided by the counts of the whole batch, so they are those of one process.
    """
    student.zero_grad()
    n = len(examples)
    counts = world.counts(n)
    totals = Totals(
        texts=sum(counts) / student.alignment_factor,
        tokens=sum(world.counts(sum(len(e.answer) for e in examples))),
    )

    # All texts through the special tokens, once. What is behind the leaves waits for the end.
    groups = _groups(examples, config)
    soft, embeddings = student.encode([ids for texts in groups.values() for ids in texts])
    soft_leaf, leaf = (x.detach().requires_grad_() for x in (soft, embeddings))
    embedded = dict(zip(groups, leaf.split(n), strict=True))
    values = {name: leaf.new_zeros(()) for name in config.weights()}

    # The losses of a text alone, each of which leaves its gradient at the leaves.
    vectors = _stacked([example.vector for example in examples], leaf)
    if config.reconstruction_weight:
        for part in _reconstruction_parts(
            student, examples, config, soft_leaf, leaf, embedded["query"], vectors, totals
        ):
            values["reconstruction"] += part.reconstruction
            values["alignment"] += part.alignment
            soft_leaf.grad = _sum(soft_leaf.grad, part.by_soft)
            leaf.grad = _sum(leaf.grad, part.by_embeddings)
    elif config.alignment_weight:
        values["alignment"] = _align(
            embedded["query"], vectors, config.alignment_weight, config, totals
        )
    if config.repeat_weight:
        values["repeat"] = _align(embedded["repeat"], vectors, config.repeat_weight, config, totals)
    if config.negative_weight:
        negatives = _stacked([example.negative_vector for example in examples], leaf)
        values["negative"] = _align(
            embedded["negative_query"], negatives, config.negative_weight, config, totals
        )
    # The losses between texts, which may be on different ranks.
    if config.margin_weight or config.contrastive_weight:
        values |= _whole_batch(leaf, embedded, config, world, counts)

    # One pass takes everything that has reached the leaves back to what is trained.
    ends = [(soft, soft_leaf.grad), (embeddings, leaf.grad)]
    reached = [(end, grad) for end, grad in ends if grad is not None]
    torch.autograd.backward([end for end, _ in reached], [grad for _, grad in reached])

    weighted = (weight * values[name] for name, weight in config.weights().items())
    values["total"] = sum(weighted, leaf.new_zeros(()))
    means = _sum_over_ranks(student, values, world)
    return Losses(**means), _work(student, examples, groups, config)


@dataclass(frozen=True)
class Totals:
    """What the losses of a global batch are divided by: its texts, its answer tokens.

    texts: of alignment, whose scale is in it.
    """

    texts: float
    tokens: int


@dataclass(frozen=True)
class _Part:
    """Losses of a part of a batch, and their weighted sum's gradients at the leaves."""

    reconstruction: Tensor
    alignment: Tensor
    by_soft: Tensor
    by_embeddings: Tensor


def _reconstruction_parts(
    student: Student,
    examples: Sequence[Example],
    config: TrainConfig,
    soft: Tensor,
    embeddings: Tensor,
    queries: Tensor,
    vectors: Tensor,
    totals: Totals,
) -> Iterator[_Part]:
    """Reconstruction and alignment of the queries, as much of the batch at a time as fits.

    soft and embeddings are the leaves; queries [n, d] are those of the embeddings that are
    aligned to vectors [n, d].
    """

    def run(part: slice) -> _Part:
        states, targets = _reconstruct(student, soft, examples, part)
        reconstruction, alignment = distill(
            states,
            student.head,
            targets,
            queries[part],
            vectors[part],
            tokens=totals.tokens,
            texts=totals.texts,
            alignment=config.alignment,
            memory=_logits_memory(student),
        )
        weighted = (
            config.reconstruction_weight * reconstruction + config.alignment_weight * alignment
        )
        # Not backward(): of a part that fails half-way nothing may have been added.
        gradients = torch.autograd.grad(weighted, (soft, embeddings))
        return _Part(reconstruction.detach(), alignment.detach(), *gradients)

    return _in_parts(student, examples, config, run)


def _align(
    student: Tensor, teacher: Tensor, weight: float, config: TrainConfig, totals: Totals
) -> Tensor:
    """Alignment loss of embeddings [n, d]; its weighted gradient is added to them."""
    loss = alignment(student, teacher, texts=totals.texts, kind=config.alignment)
    (weight * loss).backward()
    return loss.detach()


def _work(
    student: Student,
    examples: Sequence[Example],
    groups: Mapping[str, Sequence[np.ndarray]],
    config: TrainConfig,
) -> Work:
    n = len(examples)
    predicted = sum(len(e.answer) for e in examples) if config.reconstruction_weight else 0
    return Work(
        queries=sum(len(ids) for texts in groups.values() for ids in texts),
        specials=len(student.special) * n * len(groups),
        answers=predicted + n * (student.n_compression - 1) if predicted else 0,
        predicted=predicted,
    )


def _groups(examples: Sequence[Example], config: TrainConfig) -> dict[str, list[np.ndarray]]:
    """The texts whose embeddings the losses need, by kind."""
    groups = {"query": [example.query for example in examples]}
    if config.needs_repeats:
        groups["repeat"] = _present([example.repeat for example in examples])
    if config.negative_weight or config.margin_weight:
        groups["negative_query"] = _present([example.negative_query for example in examples])
    if config.contrastive_weight:
        groups["negative_repeat"] = _present([example.negative_repeat for example in examples])
    return groups


def _present(rows: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """Rows that the data has for every text where a loss needs them. Raises ValueError."""
    present = [row for row in rows if row is not None]
    if len(present) < len(rows):
        raise ValueError(f"{len(rows) - len(present)} texts lack what a loss that is on needs")
    return present


def _stacked(rows: Sequence[np.ndarray | None], like: Tensor) -> Tensor:
    """Rows as a tensor of the dtype and device of `like`."""
    return torch.from_numpy(np.stack(_present(rows))).to(like)


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    """`total` with `more` added in place, or `more` alone."""
    return more if total is None else total.add_(more)


def _in_parts(
    student: Student,
    examples: Sequence[Example],
    config: TrainConfig,
    run: Callable[[slice], T],
) -> Iterator[T]:
    """`run` of each part of the batch's answers, as much at a time as memory allows."""
    lengths = [len(example.answer) + student.n_compression - 1 for example in examples]
    return in_parts(lengths, student.part_budget, config.micro_batch_tokens, run)


def _reconstruct(
    student: Student, soft: Tensor, examples: Sequence[Example], part: slice
) -> tuple[Tensor, Tensor]:
    """States [N, h] and targets [N] of the answers of a part."""
    c = student.n_compression
    answers = [example.answer for example in examples[part]]
    states = student.answer_states(soft[part.start * c : part.stop * c], answers)
    return states, on_device(np.concatenate(answers).astype(np.int64), states.device)


def reconstruction_loss(
    student: Student, soft: Tensor, examples: Sequence[Example], config: TrainConfig
) -> float:
    """Cross-entropy summed over the answers' tokens, without gradient."""
    memory = _logits_memory(student)

    def run(part: slice) -> float:
        states, targets = _reconstruct(student, soft, examples, part)
        return float(reconstruction(states, student.head, targets, tokens=1, memory=memory))

    return sum(_in_parts(student, examples, config, run))


def _logits_memory(student: Student) -> int | None:
    return CPU_LOGITS if student.head.device.type == "cpu" else None


def _whole_batch(
    leaf: Tensor,
    embedded: Mapping[str, Tensor],
    config: TrainConfig,
    world: World,
    counts: list[int],
) -> dict[str, Tensor]:
    """This rank's share of the losses between texts, whose gradients are added to `leaf`."""
    terms: dict[str, Tensor] = {}

    def total(everyone: Mapping[str, Tensor]) -> Tensor:
        queries = everyone["query"]
        if config.margin_weight:
            terms["margin"] = losses.margin(queries, everyone["negative_query"], config.margin)
        if config.contrastive_weight:
            terms["contrastive"] = losses.contrastive(
                queries, everyone["repeat"], everyone["negative_repeat"], config.contrastive_scale
            )
        weights = config.weights()
        return torch.stack([weights[name] * loss for name, loss in terms.items()]).sum()

    gradients = losses.over_all_ranks(embedded, counts, world, total)
    leaf.grad = _sum(leaf.grad, torch.cat(list(gradients.values())))
    return {name: loss.detach() / world.size for name, loss in terms.items()}


def _sum_over_ranks(
    student: Student, values: Mapping[str, Tensor], world: World
) -> dict[str, float]:
    """Sum gradients and values over the ranks, in one message."""
    parameters = list(student.parameters())
    numbers = torch.stack(list(values.values()))
    return dict(zip(values, world.sum_gradients(parameters, numbers).tolist(), strict=True))
