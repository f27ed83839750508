"""SwiGLU in plain torch (Shazeer, arXiv 2002.05202)."""

import torch
from torch import Tensor

from gen_fast.ops.qlinear.reference import quantize_rows


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, where `gate_up` [T, 2f] holds gate and up side by side. Returns [T, f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient [T, 2f] of the input, for `grad` [T, f] of the output."""
    gate, up = gate_up.chunk(2, dim=-1)
    share = gate.sigmoid()
    # silu'(z) = s·(1 + z·(1 - s)) with s = sigmoid(z)
    return torch.cat((grad * up * share * (1 + gate * (1 - share)), grad * gate * share), dim=-1)


def swiglu_quantized(gate_up: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    """`swiglu` and then `quantize_rows`, without rounding in between."""
    wide = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    return quantize_rows(swiglu(wide), row_format)
