"""Products of rows and weights of 8 bits: the exact one, and what int8 and fp8 must keep alike."""

from collections.abc import Callable

import torch
from torch import Tensor

# (argument of an example of 2 rows and 16 outputs, what it is not, what the refusal names).
WRONG_SCALES_AND_BIASES = [
    (1, torch.ones(3), "2 rows"),
    (1, torch.ones(2).double(), "float64"),
    (3, torch.ones(15), "16 outputs"),
    (4, torch.ones(8), "bias"),
    (4, torch.ones(16).half(), "float16"),
]


def exact_product(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Of rows q [T, in] with scales [T] and a weight [out, in] with scales [out], in float64."""
    wide = weight.double() * weight_scale.double().unsqueeze(1)
    y = q.double() * scale.double().unsqueeze(1) @ wide.T
    return y if bias is None else y + bias.double()


def assert_rows_need_not_be_adjacent(
    linear: Callable[..., Tensor],
    q: Tensor,
    *rest: Tensor | None,
) -> None:
    """linear(q, *rest) is the same of rows that have others between them."""
    apart = torch.cat((q, q), 1)[:, : q.shape[1]]
    torch.testing.assert_close(linear(apart, *rest), linear(q, *rest))


def assert_stays_in_its_row(
    bad: float,
    linear: Callable[..., Tensor],
    q: Tensor,
    scale: Tensor,
    *rest: Tensor | None,
) -> None:
    """A row whose scale is not finite has such outputs, and no other row of linear(q, scale, …)."""
    scale[7] = bad
    y = linear(q, scale, *rest)
    assert y.isfinite().all(1).tolist() == [row != 7 for row in range(len(q))]
