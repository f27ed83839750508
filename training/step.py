"""One training step: losses and gradients of a batch, exact whatever its parts.

The special tokens of all texts are run once. Reconstruction, which needs most of the memory, goes
over parts of the batch; each leaves its gradient at the soft prompts, and one pass takes the sum
back through the special tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.batch import on_device, split_by_budget
from gen_fast.ops.distill import alignment, distill, reconstruction
from gen_fast.training import losses
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Example
from gen_fast.training.student import Student
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
    tokens = sum(world.counts(sum(len(example.answer) for example in examples)))
    groups = _groups(examples, config)
    soft, embeddings = student.encode([ids for group in groups.values() for ids in group])
    soft_leaf, leaf = (x.detach().requires_grad_() for x in (soft, embeddings))
    embedded = dict(zip(groups, leaf.split(n), strict=True))
    values = {item.name: leaf.new_zeros(()) for item in fields(Losses)}

    teacher = _vectors(examples, "vector", leaf)

    def run(part: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        states, targets = _reconstruct(student, soft_leaf, examples, part)
        recon, aligned = distill(
            states,
            student.head,
            targets,
            embedded["query"][part],
            teacher[part],
            tokens=tokens,
            texts=sum(counts),
            alignment=config.alignment,
            memory=_logits_memory(student),
        )
        weighted = config.reconstruction_weight * recon + config.alignment_weight * aligned
        # Not backward(): of a part that fails half-way nothing may have been added.
        return recon.detach(), aligned.detach(), torch.autograd.grad(weighted, (soft_leaf, leaf))

    if config.reconstruction_weight:
        for recon, aligned, gradients in _in_parts(student, examples, config, run):
            for end, gradient in zip((soft_leaf, leaf), gradients, strict=True):
                end.grad = gradient if end.grad is None else end.grad.add_(gradient)
            values["reconstruction"] += recon
            values["alignment"] += aligned
    alone = 0.0 if config.reconstruction_weight else config.alignment_weight
    for name, weight, group, vectors in (
        ("alignment", alone, "query", "vector"),
        ("repeat", config.repeat_weight, "repeat", "vector"),
        ("negative", config.negative_weight, "negative_query", "negative_vector"),
    ):
        if weight:
            wanted = _vectors(examples, vectors, leaf)
            aligned = alignment_loss(embedded[group], wanted, config) / sum(counts)
            (weight * aligned).backward()
            values[name] += aligned.detach()
    if config.margin_weight or config.contrastive_weight:
        _whole_batch(leaf, embedded, config, world, counts, values)

    # One pass takes everything that has reached the soft prompts and the embeddings further back.
    ends = [(soft, soft_leaf.grad), (embeddings, leaf.grad)]
    reached = [(end, grad) for end, grad in ends if grad is not None]
    torch.autograd.backward([end for end, _ in reached], [grad for _, grad in reached])

    weights = {item.name: getattr(config, f"{item.name}_weight", 0.0) for item in fields(Losses)}
    values["total"] = sum(
        (weights[name] * value for name, value in values.items()), leaf.new_zeros(())
    )
    predicted = sum(len(e.answer) for e in examples) if config.reconstruction_weight else 0
    work = Work(
        queries=sum(len(ids) for group in groups.values() for ids in group),
        specials=len(student.special) * n * len(groups),
        answers=predicted + n * (student.n_compression - 1) if predicted else 0,
        predicted=predicted,
    )
    return _sum_over_ranks(student, torch.stack(list(values.values())), world), work


def _groups(examples: Sequence[Example], config: TrainConfig) -> dict[str, list[np.ndarray]]:
    """The texts whose embeddings the losses need, by kind."""
    names = ["query"]
    names += ["repeat"] if config.needs_repeats else []
    names += ["negative_query"] if config.negative_weight or config.margin_weight else []
    names += ["negative_repeat"] if config.contrastive_weight else []
    return {name: [getattr(example, name) for example in examples] for name in names}


def _in_parts(
    student: Student,
    examples: Sequence[Example],
    config: TrainConfig,
    run: Callable[[slice], T],
) -> Iterator[T]:
    """`run` of each part of the batch, as much at a time as memory allows.

    A part that it does not suffice for is tried again with half as many tokens.
    """
    lengths = [len(example.answer) + student.n_compression - 1 for example in examples]
    start = 0
    while start < len(lengths):
        budget = student.part_budget.limit(config.micro_batch_tokens)
        count = next(split_by_budget(lengths[start:], budget)).stop
        part = slice(start, start + count)
        try:
            result = run(part)
        except RuntimeError as error:  # only running out of memory is survived
            student.part_budget.shrink(error, sum(lengths[part]), count)
            continue
        start = part.stop
        yield result


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


def alignment_loss(student: Tensor, teacher: Tensor, config: TrainConfig) -> Tensor:
    """Sum over texts of the alignment loss alone; student, teacher [B, d]."""
    return alignment(student, teacher, texts=1, kind=config.alignment)


def _vectors(examples: Sequence[Example], name: str, like: Tensor) -> Tensor:
    return torch.from_numpy(np.stack([getattr(e, name) for e in examples])).to(like)


def _whole_batch(
    leaf: Tensor,
    embedded: dict[str, Tensor],
    config: TrainConfig,
    world: World,
    counts: list[int],
    values: dict[str, Tensor],
) -> None:
    """Add the gradients of losses between texts, which may be on different ranks, to `leaf`."""
    everyone = {
        name: world.gather(rows.detach(), counts).requires_grad_()
        for name, rows in embedded.items()
    }
    total = leaf.new_zeros(())
    if config.margin_weight:
        loss = losses.margin(everyone["query"], everyone["negative_query"], config.margin)
        total = total + config.margin_weight * loss
        values["margin"] += loss.detach() / world.size
    if config.contrastive_weight:
        query, repeat, negative = (everyone[x] for x in ("query", "repeat", "negative_repeat"))
        loss = losses.contrastive(query, repeat, negative, config.contrastive_scale)
        total = total + config.contrastive_weight * loss
        values["contrastive"] += loss.detach() / world.size
    total.backward()
    first = sum(counts[: world.rank])
    own = slice(first, first + counts[world.rank])
    grads = [
        torch.zeros_like(rows[own]) if rows.grad is None else rows.grad[own]
        for rows in everyone.values()
    ]
    gradient = torch.cat(grads)
    leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _sum_over_ranks(student: Student, values: Tensor, world: World) -> Losses:
    """Sum gradients and losses over the ranks, in one message."""
    parameters = list(student.parameters())
    grads = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
    flat = world.sum(torch.cat([*(grad.flatten() for grad in grads), values.to(grads[0])]))
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return Losses(*flat[start:].tolist())
