"""SimCSE and the supervised step: texts drawn together and apart, in batches of any size.

Gradient caching: the embeddings of the whole batch are computed without gradient, the loss gives
the gradient at each, and texts are run again, some at a time, to take it to the parameters. Dropout
is the same in both passes.
Sources: LLM2Vec, arXiv 2404.05961, §2.3; SimCSE, arXiv 2104.08821; Gao et al., arXiv 2101.06983
(gradient caching).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.lora import Lora
from gen_fast.training.backbone_pass import TrainedBackbone
from gen_fast.training.losses import contrastive, over_all_ranks
from gen_fast.training.task import add_gradients, in_parts
from gen_fast.training.world import World


@dataclass(frozen=True)
class View:
    """A text as it is embedded: ids [n], the last `needed` of which are pooled.

    key: tells its dropout from that of the other views of a step.
    """

    ids: np.ndarray
    needed: int
    key: int


@dataclass(frozen=True)
class Match:
    """Views that belong together: an anchor, what it should be near to, and perhaps what not."""

    anchor: View
    positive: View
    negative: View | None = None

    def views(self) -> dict[str, View]:
        """By name."""
        named = {"anchor": self.anchor, "positive": self.positive}
        return named if self.negative is None else {**named, "negative": self.negative}

    @property
    def tokens(self) -> int:
        """Of all views."""
        return sum(len(view.ids) for view in self.views().values())


def embed(trained: TrainedBackbone, lora: Lora, views: Sequence[View], seed: int | None) -> Tensor:
    """Mean of the final-norm states of the pooled tokens: [n, h], float32."""
    needed = [view.needed for view in views]
    states = trained.states(
        [view.ids for view in views], [view.key for view in views], lora, seed, needed
    )
    lengths = torch.tensor(needed, device=states.device)
    means: Tensor = torch.segment_reduce(states.float(), "mean", lengths=lengths, axis=0)
    return means


def infonce(rows: Mapping[str, Tensor], scale: float) -> Tensor:
    """InfoNCE of anchors [B, d] against all positives and negatives, by cosine times `scale`."""
    anchors = rows["anchor"]
    return contrastive(anchors, rows["positive"], rows.get("negative", anchors[:0]), scale)


def accumulate_contrastive(
    trained: TrainedBackbone,
    lora: Lora,
    matches: Sequence[Match],
    world: World,
    *,
    scale: float,
    seed: int,
    part_tokens: int | None,
) -> Tensor:
    """Add the gradients of the global batch's InfoNCE to the factors; return this rank's share.

    matches: this rank's; all have a negative, or none. part_tokens: with gradient at a time; None
    fits the device.
    """
    names = list(matches[0].views())
    views = [match.views()[name] for name in names for match in matches]
    lengths = [len(view.ids) for view in views]
    parameters = list(lora.parameters())

    def forward(part: slice) -> Tensor:
        return embed(trained, lora, views[part], seed)

    embeddings = None
    if sum(lengths) <= trained.budget.limit(part_tokens):
        try:
            embeddings = forward(slice(None))  # one pass is enough
        except RuntimeError as error:  # only running out of memory is survived
            trained.budget.shrink(error, sum(lengths), len(lengths))
    once = embeddings is not None
    if embeddings is None:
        with torch.no_grad():
            parts = in_parts(lengths, trained.budget, part_tokens, forward)
            embeddings = torch.cat(list(parts))
    rows = dict(zip(names, embeddings.split(len(matches)), strict=True))
    shares: list[Tensor] = []

    def loss(everyone: Mapping[str, Tensor]) -> Tensor:
        value = infonce(everyone, scale)
        shares.append(value.detach() / world.size)
        return value

    counts = world.counts(len(matches))
    cached = torch.cat(list(over_all_ranks(rows, counts, world, loss).values()))

    def backward(part: slice) -> tuple[Tensor, ...]:
        # Not backward(): of a part that fails half-way nothing may have been added.
        return torch.autograd.grad(forward(part), parameters, cached[part])

    if once:
        add_gradients(parameters, torch.autograd.grad(embeddings, parameters, cached))
    else:
        for gradients in in_parts(lengths, trained.budget, part_tokens, backward):
            add_gradients(parameters, gradients)
    return shares[0]
