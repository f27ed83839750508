"""Masked next-token prediction: blocks of running text, masks, and the loss.

Source: LLM2Vec, arXiv 2404.05961, §2.2 and appendix D.1.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.batch import on_device
from gen_fast.model.lora import Lora
from gen_fast.ops.distill import reconstruction
from gen_fast.training.backbone_pass import TrainedBackbone

# Of the tokens that are chosen: become the mask token, another token; the rest stays.
BERT = (0.8, 0.1)


@dataclass(frozen=True)
class MaskedText:
    """A text with some tokens hidden.

    ids [n]: what the model reads. places [m]: of the tokens it has to tell, never 0. targets [m]:
    those tokens. key: tells its dropout from that of the other texts of a step.
    """

    ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    key: int


def blocks(rows: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Texts one after another, cut into blocks of `length` tokens; the rest is left out."""
    running = np.concatenate(rows) if len(rows) else np.empty(0, dtype=np.int32)
    return list(running[: len(running) // length * length].reshape(-1, length))


def hide(
    ids: np.ndarray,
    *,
    key: int,
    probability: float,
    masking: str,
    mask_id: int,
    vocabulary: int,
    special: np.ndarray,
    draws: np.random.Generator,
) -> MaskedText:
    """Hide each token of a text with `probability`; special ids are never hidden.

    masking: "bert" makes 80% of the hidden tokens the mask token, 10% one of the vocabulary's, and
    leaves 10%; "always" makes all of them the mask token. The first token may be hidden, but no
    position comes before it that could tell it.
    """
    chosen = (draws.random(len(ids)) < probability) & ~np.isin(ids, special)
    read = ids.copy()
    if masking == "always":
        read[chosen] = mask_id
    else:
        kind = draws.random(len(ids))
        read[chosen & (kind < BERT[0])] = mask_id
        replaced = chosen & (kind >= BERT[0]) & (kind < sum(BERT))
        read[replaced] = draws.integers(0, vocabulary, replaced.sum())
    places = np.flatnonzero(chosen[1:]) + 1
    return MaskedText(read, places, ids[places], key)


def mntp_states(
    trained: TrainedBackbone, lora: Lora, texts: Sequence[MaskedText], seed: int | None
) -> tuple[Tensor, Tensor]:
    """Final-norm states [N, h] at the rows before the hidden tokens, and those tokens [N].

    seed: of the step's dropout; None for none.
    """
    states = trained.states([t.ids for t in texts], [t.key for t in texts], lora, seed)
    starts = np.cumsum([0, *(len(text.ids) for text in texts)])
    rows = [start + text.places - 1 for start, text in zip(starts, texts, strict=False)]
    device = states.device
    targets = np.concatenate([text.targets for text in texts]).astype(np.int64)
    return states[on_device(np.concatenate(rows), device)], on_device(targets, device)


def mntp_loss(states: Tensor, head: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Cross-entropy summed over the hidden tokens, divided by `tokens`."""
    if not len(targets):
        return states.sum() * 0
    loss: Tensor = reconstruction(states, head, targets, tokens=tokens)
    return loss


@torch.no_grad()
def right(states: Tensor, head: Tensor, targets: Tensor) -> int:
    """How many of the hidden tokens are the likeliest ones."""
    parts = zip(states.split(256), targets.split(256), strict=True)
    return sum(int(((part @ head.T).argmax(-1) == wanted).sum()) for part, wanted in parts)
