"""Choice of implementation for swiglu."""

from torch import Tensor

from gen_fast.ops import Op

from . import reference

OP = Op("swiglu")
OP.register("reference")(reference.swiglu)


def swiglu(gate_up: Tensor, *, impl: str | None = None) -> Tensor:
    """silu(gate) · up for `gate_up` [T, 2f], gate first. Returns [T, f] in the same dtype.

    Source: Shazeer, arXiv 2002.05202, eq. 6.
    """
    result: Tensor = OP.choose(gate_up.device.type, impl)(gate_up)
    return result
