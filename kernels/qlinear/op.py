"""Schemas and choice of implementation for rows that are quantised."""

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Case, Op, gpu, native, other_option

from . import reference


def cpp_supports(case: Case) -> str | None:
    """Why a C++ op that quantises rows cannot compute `case`, or None."""
    if case.option == reference.ROTATED:
        return native.cpp(case)
    return native.cpp(case) or other_option(case, "int8")


def fake_quantized(x: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    """Empty results of quantising rows of the shape of `x` [T, f]."""
    dtype, _ = reference.FORMATS[row_format]
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


def check_format(row_format: str) -> None:
    """Raise OpError unless rows quantise to `row_format`."""
    if row_format not in reference.FORMATS:
        raise OpError(f"rows quantise to {', '.join(reference.FORMATS)}, not to {row_format!r}")


def _check(x: Tensor, row_format: str) -> None:
    check_format(row_format)
    if x.dim() != 2:
        raise OpError(f"rows to quantise are a matrix, not of shape {list(x.shape)}")


OP = Op(
    "quantize_rows",
    "(Tensor x, str row_format) -> (Tensor, Tensor)",
    fake_quantized,
    check=_check,
    option=lambda x, row_format: row_format,
)
OP.register(REFERENCE)(reference.quantize_rows)


OP.register(TRITON, gpu.supports)(gpu.deferred("qlinear.triton_kernel", "quantize_rows"))


@OP.register(CPP, cpp_supports)
def _cpu(x: Tensor, row_format: str) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    q, scale = fake_quantized(x, row_format)
    native.module().quantize_rows(x.dtype, x, q, scale, *x.shape, row_format == reference.ROTATED)
    return q, scale


def quantize_rows(
    x: Tensor, dtype: str = "int8", *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise each row of `x` [T, f] symmetrically. Returns (q [T, f], scale [T] float32).

    dtype "int8" gives torch.int8 in [-127, 127], rounded to nearest even; "fp8" gives
    torch.float8_e4m3fn; "int8-rotated" what int8 gives of `rotate_rows(x)`.
    scale = max|row| / 127 (448 for fp8), so x ≈ q · scale. No gradient.
    Norm and swiglu do the same to their own result before it reaches memory.
    Raises OpError for another dtype, or if `x` is no matrix.

    Source: Dettmers et al., arXiv 2208.07339, §2 (row-wise absmax).
    """
    result: tuple[Tensor, Tensor] = OP(x, dtype, impl=impl)
    return result
