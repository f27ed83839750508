"""Language models compared token by token: perplexity, and how far one has moved from another.

Texts are packed, and logits exist for some rows at a time, so that a long corpus takes little
memory.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_fast.errors import ConfigError
from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch, on_device, split_by_budget
from gen_fast.ops.norm import rms_norm

# Bytes of float32 logits of a model at a time.
LOGITS_BYTES = 256 << 20
CPU_TOKENS, GPU_TOKENS = 2048, 16384


@dataclass(frozen=True)
class LanguageModel:
    """A backbone and its language-model head [V, h]."""

    backbone: Backbone
    head: Tensor

    def states(self, batch: PackedBatch) -> Tensor:
        """Final-norm states [R, h] of the needed rows."""
        stream = self.backbone.forward(batch)
        return rms_norm(stream, self.backbone.final_norm, self.backbone.config.norm_eps)


@dataclass(frozen=True)
class ScoredText:
    """ids [n] of a text, of which the last `counted` are scored, never the first."""

    ids: np.ndarray
    counted: int


@dataclass(frozen=True)
class Drift:
    """Means over the scored tokens, in nats, that two models give.

    tokens: scored. kl: KL(base‖model) of the next token's distribution. base_loss, model_loss:
    cross-entropy of the tokens. agreement: how often the likeliest token is the same.
    """

    tokens: int
    kl: float
    base_loss: float
    model_loss: float
    agreement: float

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of the base and of the model."""
        return math.exp(self.base_loss), math.exp(self.model_loss)


@torch.inference_mode()
def drift(base: LanguageModel, model: LanguageModel, texts: Sequence[ScoredText]) -> Drift:
    """Compare a model with its base over texts. Raises ConfigError without a token to score."""
    tokens = sum(text.counted for text in texts)
    if not tokens:
        raise ConfigError("there is no token to score")
    device = base.backbone.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    rows = max(1, LOGITS_BYTES // (4 * len(base.head)))
    budget = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    for part in split_by_budget([len(text.ids) for text in texts], budget):
        batch, targets = _packed(texts[part], device)
        states = (side.states(batch) for side in (base, model))
        chunks = zip(*(x.split(rows) for x in states), targets.split(rows), strict=True)
        for base_rows, model_rows, wanted in chunks:
            sums += _compared(base_rows @ base.head.T, model_rows @ model.head.T, wanted)
    kl, base_loss, model_loss, agreement = (sums / tokens).tolist()
    return Drift(tokens, kl, base_loss, model_loss, agreement)


def _packed(texts: Sequence[ScoredText], device: torch.device) -> tuple[PackedBatch, Tensor]:
    """Texts without their last token, which tells nothing more; and the tokens to tell."""
    counts = [text.counted for text in texts]
    batch = PackedBatch.pack([text.ids[:-1] for text in texts], needed=counts, device=device)
    targets = [text.ids[len(text.ids) - text.counted :] for text in texts]
    return batch, on_device(np.concatenate(targets).astype(np.int64), device)


def _compared(base_logits: Tensor, model_logits: Tensor, targets: Tensor) -> Tensor:
    """Sums [4] over rows, float64: KL, both cross-entropies, and equal likeliest tokens."""
    base, model = (x.float().log_softmax(-1) for x in (base_logits, model_logits))
    kl = (base.exp() * (base - model)).sum(-1)
    losses = [-x.gather(1, targets[:, None])[:, 0] for x in (base, model)]
    same = base.argmax(-1) == model.argmax(-1)
    return torch.stack([x.double().sum() for x in (kl, *losses, same)])


def answer_texts(pairs: Iterable[tuple[np.ndarray, np.ndarray]], tokens: int) -> list[ScoredText]:
    """(prompt ids, answer ids) as texts whose answers are scored, `tokens` in all, or fewer."""
    texts = (
        ScoredText(np.concatenate((prompt, answer)), len(answer))
        for prompt, answer in pairs
        if len(prompt) and len(answer)
    )
    return list(_up_to(texts, tokens))


def running_texts(rows: Sequence[np.ndarray], length: int, tokens: int) -> list[ScoredText]:
    """Rows of ids in pieces of `length`, all but the first id of each scored, `tokens` in all."""
    pieces = (row[start : start + length] for row in rows for start in range(0, len(row), length))
    return list(_up_to((ScoredText(ids, len(ids) - 1) for ids in pieces if len(ids) > 1), tokens))


def _up_to(texts: Iterable[ScoredText], tokens: int) -> Iterator[ScoredText]:
    """Texts until `tokens` are scored; the last loses its tail."""
    left = tokens
    for text in texts:
        if left < 1:
            return
        cut = max(0, text.counted - left)
        yield ScoredText(text.ids[: len(text.ids) - cut], text.counted - cut)
        left -= text.counted
