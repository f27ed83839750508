"""Tokens of a text told from the row before them: states, losses, gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.batch import on_device
from gen_fast.ops.dense import product
from gen_fast.ops.distill import reconstruction
from gen_fast.training.backbone_pass import Block, TrainedBackbone
from gen_fast.training.task import add_gradients, in_parts

# Bytes of float32 logits at a time, of each of the two models that are compared.
CPU_LOGITS, GPU_LOGITS = 64 << 20, 1 << 30


@dataclass(frozen=True)
class PredictedText:
    """A text of which some tokens are to be told.

    ids [n]: what the model reads. places [m]: of the tokens it has to tell, never 0. targets [m]:
    those tokens. key: tells its dropout from that of the other texts of a step. block: its special
    tokens, where the mask knows such. is_plain: it has none, and the base can tell it too.
    """

    ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    key: int
    block: Block | None = None
    is_plain: bool = False


def predicted_states(
    trained: TrainedBackbone, texts: Sequence[PredictedText], seed: int | None
) -> tuple[Tensor, Tensor]:
    """Final-norm states [N, h] at the rows before the tokens to tell, and those tokens [N].

    seed: of the step's dropout; None for none.
    """
    states = trained.states(
        [text.ids for text in texts],
        [text.key for text in texts],
        seed,
        blocks=[text.block for text in texts],
    )
    starts = np.cumsum([0, *(len(text.ids) for text in texts)])
    rows = [start + text.places - 1 for start, text in zip(starts, texts, strict=False)]
    device = states.device
    targets = np.concatenate([text.targets for text in texts]).astype(np.int64)
    return states[on_device(np.concatenate(rows), device)], on_device(targets, device)


def cross_entropy(states: Tensor, head: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Cross-entropy summed over the tokens to tell, divided by `tokens`."""
    if not len(targets):
        return states.sum() * 0
    loss: Tensor = reconstruction(states, head, targets, tokens=tokens)
    return loss


def divergence(states: Tensor, base: Tensor, head: Tensor, tokens: float) -> Tensor:
    """KL(base‖model) of the next token, summed over rows and divided by `tokens`: float32.

    states, base [N, h]: final-norm states of the same rows; head [V, h]. Gradients reach `states`.
    Logits exist for some rows at a time.
    """
    loss: Tensor = _Divergence.apply(states, base, head, tokens)  # type: ignore[no-untyped-call]
    return loss


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the loss, so that no logits are kept."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, base: Tensor, head: Tensor, tokens: float) -> Tensor:
        rows = max(1, (GPU_LOGITS if states.is_cuda else CPU_LOGITS) // (4 * len(head)))
        gradient = torch.empty_like(states)
        loss = torch.zeros((), device=states.device)
        for own, other, out in zip(*(x.split(rows) for x in (states, base, gradient)), strict=True):
            log_q, log_p = (product(x, head).float().log_softmax(-1) for x in (own, other))
            p = log_p.exp()
            loss += (p * (log_p - log_q)).sum()
            out.copy_(product((log_q.exp_() - p).div_(tokens).to(head.dtype), head.T))
        ctx.save_for_backward(gradient)
        return loss / tokens

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss.to(gradient.dtype), None, None, None


def plain_divergence(
    trained: TrainedBackbone,
    head: Tensor,
    states: Tensor,
    texts: Sequence[PredictedText],
    tokens: float,
) -> Tensor:
    """The divergence at the rows of the plain texts. states: as `predicted_states` gives them."""
    counts = [len(text.places) for text in texts]
    chosen = np.repeat([text.is_plain for text in texts], counts)
    if not chosen.any():
        return states.sum() * 0
    rows = on_device(np.flatnonzero(chosen), states.device)
    whole = [text.ids for text in texts if text.is_plain]
    starts = np.cumsum([0, *map(len, whole)])
    places = [text.places for text in texts if text.is_plain]
    told = [start + place - 1 for start, place in zip(starts, places, strict=False)]
    base = trained.base_states(whole)[on_device(np.concatenate(told), states.device)]
    return divergence(states[rows], base, head, tokens)


def accumulate_prediction(
    trained: TrainedBackbone,
    head: Tensor,
    texts: Sequence[PredictedText],
    tokens: int,
    *,
    seed: int,
    part_tokens: int | None,
    weight: float = 1.0,
    base_weight: float = 0.0,
    plain_tokens: int = 0,
) -> Tensor:
    """Add the gradients of weight · cross-entropy to what is trained, and others to it.

    tokens: to tell in the texts of all ranks, by which the sum over these is divided. part_tokens:
    with gradient at a time; None fits the device. base_weight: of the divergence at plain texts,
    which have plain_tokens to tell on all ranks. Returns this rank's share [2] of both losses.
    """
    parameters = trained.parameters

    def backward(part: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        states, targets = predicted_states(trained, texts[part], seed)
        losses = [cross_entropy(states, head, targets, tokens)]
        total = losses[0] * weight
        if base_weight:
            kept = plain_divergence(trained, head, states, texts[part], max(1, plain_tokens))
            total = total + kept * base_weight
            losses.append(kept)
        shares = torch.stack([loss.detach().float() for loss in losses])
        return shares, torch.autograd.grad(total, parameters)

    total = torch.zeros(2, device=trained.backbone.device)
    lengths = [len(text.ids) for text in texts]
    for loss, gradients in in_parts(lengths, trained.budget, part_tokens, backward):
        total[: len(loss)] += loss
        add_gradients(parameters, gradients)
        del gradients  # before those of the next part are there
    return total


@torch.no_grad()
def right(states: Tensor, head: Tensor, targets: Tensor) -> int:
    """How many of the tokens to tell are the likeliest ones."""
    parts = zip(states.split(256), targets.split(256), strict=True)
    return sum(int((product(part, head).argmax(-1) == wanted).sum()) for part, wanted in parts)


@torch.no_grad()
def evaluate_prediction(
    trained: TrainedBackbone,
    head: Tensor,
    texts: Sequence[PredictedText],
    part_tokens: int | None,
) -> Mapping[str, float]:
    """Mean cross-entropy of the tokens to tell as "loss", and the share told right as "accuracy".

    Without dropout. Empty if there are none.
    """
    texts = [text for text in texts if len(text.places)]
    tokens = sum(len(text.places) for text in texts)
    if not tokens:
        return {}

    def score(part: slice) -> tuple[float, int]:
        states, targets = predicted_states(trained, texts[part], None)
        return float(cross_entropy(states, head, targets, tokens)), right(states, head, targets)

    lengths = [len(text.ids) for text in texts]
    scores = list(in_parts(lengths, trained.budget, part_tokens, score))
    return {
        "loss": sum(value for value, _ in scores),
        "accuracy": sum(count for _, count in scores) / tokens,
    }


@torch.no_grad()
def evaluate_divergence(
    trained: TrainedBackbone,
    head: Tensor,
    texts: Sequence[PredictedText],
    part_tokens: int | None,
) -> float:
    """Mean KL(base‖model) of the next token over plain texts, in nats."""
    tokens = sum(len(text.places) for text in texts)

    def score(part: slice) -> float:
        states, _ = predicted_states(trained, texts[part], None)
        return float(plain_divergence(trained, head, states, texts[part], max(1, tokens)))

    lengths = [len(text.ids) for text in texts]
    return sum(in_parts(lengths, trained.budget, part_tokens, score))
