"""Losses over the embeddings of a whole batch, with hard negatives. Sizes: B texts, d dimensions.

Each is the mean over all queries of all ranks; every rank computes it whole and keeps the gradient
of its own texts, so that no gradient has to be sent.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, relu

from gen_fast.training.world import World


def over_all_ranks(
    rows: Mapping[str, Tensor],
    counts: Sequence[int],
    world: World,
    loss: Callable[[Mapping[str, Tensor]], Tensor],
) -> dict[str, Tensor]:
    """The gradient of a loss between the texts of all ranks at this rank's rows.

    rows: tensors [n, d] of this rank's n = counts[rank] texts; loss gets those of all texts under
    the same names.
    """
    everyone = {
        name: world.gather(own.detach(), counts).requires_grad_() for name, own in rows.items()
    }
    loss(everyone).backward()
    first = sum(counts[: world.rank])
    own = slice(first, first + counts[world.rank])
    return {
        name: torch.zeros_like(all_rows[own]) if all_rows.grad is None else all_rows.grad[own]
        for name, all_rows in everyone.items()
    }


def margin(queries: Tensor, negatives: Tensor, threshold: float) -> Tensor:
    """Mean of max(0, threshold² - ‖q - c‖²) over queries q and all other texts c.

    queries, negatives [B, d]: the candidates c are both, but for q itself.
    Source: the reference package's margin loss (llm2vec-gen 0.1, losses.py).
    """
    candidates = torch.cat((queries, negatives))
    squared = (
        queries.square().sum(1, keepdim=True)
        + candidates.square().sum(1)
        - 2 * queries @ candidates.T
    ).clamp(min=0)
    others = ~torch.eye(len(queries), len(candidates), dtype=torch.bool, device=queries.device)
    return relu(threshold**2 - squared[others]).mean()


def contrastive(
    queries: Tensor, positives: Tensor, negatives: Tensor, scale: float | Tensor
) -> Tensor:
    """InfoNCE: query i should be nearer, by cosine, to positive i than to any other text.

    queries, positives, negatives [B, d]. Source: van den Oord et al., arXiv 1807.03748.
    """
    candidates = normalize(torch.cat((positives, negatives)), dim=-1)
    logits = scale * normalize(queries, dim=-1) @ candidates.T
    return cross_entropy(logits, torch.arange(len(queries), device=queries.device))
