"""Where the embeddings of special tokens begin."""

import torch
from torch import Tensor


def special_rows(table: Tensor, count: int, init: str, generator: torch.Generator) -> Tensor:
    """Rows [count, h], float32, for new tokens beside an embedding table [V, h].

    init: "draw" from the distribution of the table's rows, or all at its "mean" row.
    """
    return (_like_rows_of if init == "draw" else _mean_rows_of)(table, count, generator)


def _mean_rows_of(table: Tensor, count: int, _: torch.Generator) -> Tensor:
    """The mean row of `table` [V, h], `count` times: float32."""
    # Part by part: the whole table in float64 may take gigabytes.
    total = torch.stack([rows.double().sum(0) for rows in table.detach().split(4096)]).sum(0)
    return (total / len(table)).float().cpu().repeat(count, 1)


def _like_rows_of(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` rows from N(mean, covariance) of the rows of `table` [V, h]: float32.

    With z from N(0, 1) for each of the V rows, mean + sum(z · (row - mean)) / √V has just that
    distribution, so no covariance has to be made.
    """
    noise = torch.randn(count, len(table), generator=generator).to(table.device)
    # Rows less their mean, weighted: the mean is taken out of the weights instead.
    weights = (noise - noise.mean(1, keepdim=True)) / len(table) ** 0.5 + 1 / len(table)
    drawn = torch.zeros(count, table.shape[1], dtype=torch.float64, device=table.device)
    for share, rows in zip(weights.split(4096, 1), table.detach().split(4096), strict=True):
        drawn += share.double() @ rows.double()  # part by part, as above
    return drawn.float().cpu()
