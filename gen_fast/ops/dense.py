"""Products of dense matrices, by the library that is the fastest where they are.

torch multiplies float32 on a CPU by MKL, which knows Intel's processors: on a Zen 5 oneDNN, which
torch has as well, takes less than half of the time (bench/README.md, "Training step").
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weightᵀ [in, out], plus bias [out]: [T, out]. Has no gradient by oneDNN."""
    if by_onednn(x):
        weight = without_gaps(weight)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return linear(x, weight, bias)


def without_gaps(weight: Tensor) -> Tensor:
    """`weight` with nothing between its rows, or its columns.

    For others oneDNN has its reference alone, which takes a thousand times as long.
    """
    return weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()


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
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    vendors = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return bool(vendors) and vendors[0] != "GenuineIntel"
