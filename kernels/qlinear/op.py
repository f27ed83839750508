"""Schema and choice of implementation for qlinear: the row-quantising half."""

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import Op, gpu, native

from . import reference


def fake_quantized(x: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """Empty results of quantising rows of the shape of `x` [T, f]."""
    dtype, _ = reference.FORMATS[variant]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


def check_format(variant: str) -> None:
    """Raise OpError unless rows quantise to `variant`."""
    if variant not in reference.FORMATS:
        raise OpError(f"rows quantise to {', '.join(reference.FORMATS)}, not to {variant!r}")


def _check(x: Tensor, variant: str) -> None:
    check_format(variant)
    if x.dim() != 2:
        raise OpError(f"rows to quantise are a matrix, not of shape {list(x.shape)}")


OP = Op(
    "quantize_rows",
    "(Tensor x, str variant) -> (Tensor, Tensor)",
    fake_quantized,
    check=_check,
)
OP.register("reference")(reference.quantize_rows)


@OP.register("triton", **gpu.ON_GPU, refuses=gpu.refuses_fp8)
def _triton(x: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    from . import triton_kernel

    return triton_kernel.quantize_rows(x, variant)


@OP.register("cpu", **native.ON_CPU, variants=("int8",))
def _cpu(x: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    q, scale = fake_quantized(x, variant)
    native.module().quantize_rows(
        x.dtype == torch.bfloat16, *map(native.address, (x, q, scale)), *x.shape
    )
    return q, scale


def quantize_rows(
    x: Tensor, dtype: str = "int8", *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise each row of `x` [T, f] symmetrically. Returns (q [T, f], scale [T] float32).

    dtype "int8" gives torch.int8 in [-127, 127], rounded to nearest even; "fp8" gives
    torch.float8_e4m3fn. scale = max|row| / 127 (448 for fp8), so x ≈ q · scale. No gradient.
    Norm and swiglu do the same to their own result before it reaches memory.
    Raises OpError for another dtype, or if `x` is no matrix.

    Source: Dettmers et al., arXiv 2208.07339, §2 (row-wise absmax).
    """
    result: tuple[Tensor, Tensor] = OP(x, dtype, impl=impl)
    return result
