"""Products of dense matrices, by the library that is the fastest where they are.

torch multiplies float32 on a CPU by MKL, which knows Intel's processors. On a Zen 5 a training step
takes half of the time by oneDNN, which torch has as well (bench/README.md, "Training step").
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

from gen_fast.io.cpuinfo import cpuinfo


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weightᵀ [in, out], plus bias [out]: [T, out].

    weight: also in oneDNN's layout. By oneDNN the product has no gradient.
    """
    if weight.is_mkldnn or by_onednn(x):
        weight = without_gaps(weight)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return linear(x, weight, bias)


def without_gaps(weight: Tensor) -> Tensor:
    """`weight` with nothing between its rows, or its columns: oneDNN takes others very slowly.

    It has no kernel for them, only its reference.
    """
    if weight.is_mkldnn or weight.is_contiguous() or weight.T.is_contiguous():
        return weight
    return weight.contiguous()


def by_onednn(x: Tensor) -> bool:
    """Whether `product` of such a matrix is oneDNN's, which knows no empty one."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and _onednn_is_faster_than_mkl()
    )


@cache
def _onednn_is_faster_than_mkl() -> bool:
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and cpuinfo("vendor_id") not in (None, "GenuineIntel")
