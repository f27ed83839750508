"""Schema and choice of implementation for products of rows and weights in fp8."""

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import REFERENCE, SCALED_MM, Case, gpu, unsupported

from . import fp8
from .int8_op import GPU_DTYPES, other_dtype, product_op
from .reference import Epilogue, scaled_product

# Sums of e4m3 products in full float32. On Hopper the tensor cores can keep fewer bits of them,
# which is faster (kernels/qlinear/README.md): what an embedding loses to fp8 was measured with
# exact sums, and is no little.
FAST_SUMS = False


def _check_weight(weight: Tensor) -> None:
    if weight.dtype != torch.float8_e4m3fn or not fp8.fits_fp8(tuple(weight.shape)):
        raise OpError(
            f"a weight in fp8 is float8_e4m3fn [out, in], both multiples of {fp8.MULTIPLE}, not "
            f"{weight.dtype} {list(weight.shape)}"
        )


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


FP8 = product_op("fp8_linear", "weight", _check_weight, _shape)


def _only_named(case: Case) -> str | None:
    """Plain torch multiplies fp8 as float32: never what somebody wants who asks for fp8."""
    return None if case.forced else "is the oracle: it runs where it is named"


FP8.register(REFERENCE, _only_named)(scaled_product)


def _scaled_mm_supports(case: Case) -> str | None:
    # The first argument is fp8, always; the dtype that varies is the result's.
    return (
        other_dtype(case, GPU_DTYPES)
        or unsupported(case, "cuda", (case.dtype,))
        or gpu.fp8_missing()
    )


@FP8.register(SCALED_MM, _scaled_mm_supports)
def scaled_mm(
    q: Tensor, weight: Tensor, epilogue: Epilogue, *, fast_sums: bool = FAST_SUMS
) -> Tensor:
    """See `fp8_linear`. fast_sums: of fewer bits, for the benchmark."""
    q, columns = q.contiguous(), weight.contiguous().T
    scale, bias, dtype = epilogue.scale.contiguous(), epilogue.bias, epilogue.dtype
    by_row, by_output = scale.unsqueeze(1), epilogue.weight_scale.contiguous().unsqueeze(0)
    if not len(q):
        return scale.new_empty(0, len(weight), dtype=dtype)
    if dtype == torch.bfloat16:
        y: Tensor = torch._scaled_mm(
            q, columns, by_row, by_output, bias, out_dtype=dtype, use_fast_accum=fast_sums
        )
        return y
    # With a scale a row torch gives bfloat16 alone on some GPUs: without any, float32 on all.
    one = scale.new_ones(())
    sums = torch._scaled_mm(q, columns, one, one, out_dtype=torch.float32, use_fast_accum=fast_sums)
    y = sums.mul_(by_row).mul_(by_output)
    return (y if bias is None else y.add_(bias)).to(dtype)


def fp8_linear(q: Tensor, weight: Tensor, epilogue: Epilogue, *, impl: str | None = None) -> Tensor:
    """Rows in fp8 times a weight in fp8, transposed: [T, out] in epilogue.dtype.

    q [T, in] float8_e4m3fn and epilogue.scale as `quantize_rows(…, "fp8")` gives them; weight
    [out, in] float8_e4m3fn and epilogue.weight_scale as `quantize_weight_fp8` does, out and in
    multiples of 16. Sums are float32. No gradient.
    Raises OpError for shapes and dtypes that do not fit, ImplementationError where there is no GPU
    of sm_89 or newer, unless the reference is named.

    Source: Micikevicius et al., arXiv 2209.05433; torch._scaled_mm with a scale a row.
    """
    result: Tensor = FP8(q, weight, epilogue, impl=impl)
    return result
