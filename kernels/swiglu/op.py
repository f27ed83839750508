"""Choice of implementation for swiglu."""

import torch
from torch import Tensor

from gen_fast.ops import Op, native

from . import reference

OP = Op("swiglu")
OP.register("reference")(reference.swiglu)


@OP.register("cpu", **native.ON_CPU)
def _cpu(gate_up: Tensor) -> Tensor:
    gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    native.module().swiglu(
        out.dtype == torch.bfloat16, native.address(gate_up), native.address(out), rows, size
    )
    return out


def swiglu(gate_up: Tensor, *, impl: str | None = None) -> Tensor:
    """silu(gate) · up for `gate_up` [T, 2f], gate first. Returns [T, f] in the same dtype.

    Source: Shazeer, arXiv 2002.05202, eq. 6.
    """
    result: Tensor = OP.choose(impl, gate_up)(gate_up)
    return result
