"""SwiGLU in plain torch (Shazeer, arXiv 2002.05202)."""

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, where `gate_up` [T, 2f] holds gate and up side by side. Returns [T, f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
