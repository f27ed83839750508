"""Tokens of a text told from the row before them: states, cross-entropy, gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.batch import on_device
from gen_fast.ops.distill import reconstruction
from gen_fast.training.backbone_pass import Block, TrainedBackbone
from gen_fast.training.task import add_gradients, in_parts


@dataclass(frozen=True)
class PredictedText:
    """A text of which some tokens are to be told.

    ids [n]: what the model reads. places [m]: of the tokens it has to tell, never 0. targets [m]:
    those tokens. key: tells its dropout from that of the other texts of a step. block: its special
    tokens, where the mask knows such.
    """

    ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    key: int
    block: Block | None = None


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


def accumulate_prediction(
    trained: TrainedBackbone,
    head: Tensor,
    texts: Sequence[PredictedText],
    tokens: int,
    *,
    seed: int,
    part_tokens: int | None,
    weight: float = 1.0,
) -> Tensor:
    """Add the gradients of weight · cross-entropy to what is trained; return the cross-entropy.

    tokens: to tell in the texts of all ranks, by which the sum over these is divided. part_tokens:
    with gradient at a time; None fits the device.
    """
    parameters = trained.parameters

    def backward(part: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        states, targets = predicted_states(trained, texts[part], seed)
        loss = cross_entropy(states, head, targets, tokens)
        return loss.detach(), torch.autograd.grad(loss * weight, parameters)

    total = torch.zeros((), device=trained.backbone.device)
    lengths = [len(text.ids) for text in texts]
    for loss, gradients in in_parts(lengths, trained.budget, part_tokens, backward):
        total += loss
        add_gradients(parameters, gradients)
    return total


@torch.no_grad()
def right(states: Tensor, head: Tensor, targets: Tensor) -> int:
    """How many of the tokens to tell are the likeliest ones."""
    parts = zip(states.split(256), targets.split(256), strict=True)
    return sum(int(((part @ head.T).argmax(-1) == wanted).sum()) for part, wanted in parts)


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
