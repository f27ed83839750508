"""Choice of implementation for rope."""

import torch
from torch import Tensor

from gen_fast.ops import Op, native

from . import reference

OP = Op("rope")
OP.register("reference")(reference.rope)


@OP.register("cpu", **native.ON_CPU)
def _cpu(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    rows, heads, size = x.shape
    if x.stride()[1:] != (size, 1):
        x = x.contiguous()
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    norm = None if norm is None else norm.contiguous()
    native.module().rope(
        *(x.dtype == torch.bfloat16, native.address(x), x.stride(0)),
        *map(native.address, (cos, sin, norm)),
        *(rows, heads, size, eps),
    )
    return x


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    *,
    impl: str | None = None,
) -> Tensor:
    """Apply the optional per-head RMSNorm and the rotary embedding. Returns [T, N, D].

    x [T, N, D]: the query and key heads side by side, so that one pass serves both; any strides
    with a unit last one. cos, sin [T, D/2]: float32 (float64 if x is), of each row's position.
    Without gradients the result may be `x` itself, rotated in place.
    norm [N, D]: a norm weight for each head (Qwen3: the query weight H times, then the key weight
    KV times), or None.

    Source: Su et al., arXiv 2104.09864; Qwen3 technical report, arXiv 2505.09388, §2.
    """
    result: Tensor = OP.choose(impl, x)(x, cos, sin, norm, eps)
    return result
