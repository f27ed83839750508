"""Products of rows and weights of 8 bits, such weights as a matrix: schemas and implementations."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Case, Op, gpu, native, unsupported

from . import int8
from .reference import Epilogue, rotate_rows, scaled_product

# Dtypes that results may have on a GPU.
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _shape(blocks: Tensor) -> tuple[int, int]:
    """(out, in) of a weight."""
    return blocks.shape[0] * int8.OUTPUTS, blocks.shape[1] * int8.INPUTS


def _check_blocks(blocks: Tensor) -> None:
    width = int8.OUTPUTS * int8.INPUTS
    if blocks.dtype != torch.int8 or blocks.dim() != 3 or blocks.shape[2] != width:
        raise OpError(
            f"a weight of 8 bits is int8 [out / 16, in / 4, {width}], not {blocks.dtype} "
            f"{list(blocks.shape)}"
        )


def _check_weight(blocks: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> None:
    _check_blocks(blocks)
    _check_scales("outputs", weight_scale, _shape(blocks)[0])


def _check_scales(name: str, scale: Tensor, size: int) -> None:
    if scale.dtype != torch.float32 or tuple(scale.shape) != (size,):
        raise OpError(f"scales of {size} {name} are float32, not {scale.dtype} {list(scale.shape)}")


def product_op(
    name: str,
    weight_name: str,
    check_weight: Callable[[Tensor], None],
    shape_of: Callable[[Tensor], tuple[int, int]],
) -> Op:
    """The op of rows of 8 bits times a weight of the same dtype, each with its scales.

    weight_name: its name in the schema. check_weight raises OpError for one that is none; shape_of
    gives its (out, in).
    """

    def check(q: Tensor, weight: Tensor, epilogue: Epilogue) -> None:
        check_weight(weight)
        out, inputs = shape_of(weight)
        if q.dtype != weight.dtype or q.dim() != 2 or q.shape[1] != inputs:
            expected = str(weight.dtype).removeprefix("torch.")
            raise OpError(
                f"rows for a weight of [{out}, {inputs}] are {expected} [T, {inputs}], not "
                f"{q.dtype} {list(q.shape)}"
            )
        _check_scales("rows", epilogue.scale, len(q))
        _check_scales("outputs", epilogue.weight_scale, out)
        bias, dtype = epilogue.bias, epilogue.dtype
        if bias is not None and (tuple(bias.shape) != (out,) or bias.dtype != dtype):
            raise OpError(
                f"a bias for {out} outputs in {dtype} is not {bias.dtype} {list(bias.shape)}"
            )

    return Op(
        name,
        f"(Tensor q, Tensor {weight_name}, Tensor scale, Tensor weight_scale, Tensor? bias,"
        " ScalarType dtype) -> Tensor",
        lambda q, weight, epilogue: q.new_empty(len(q), shape_of(weight)[0], dtype=epilogue.dtype),
        check=check,
        option=lambda q, weight, epilogue: str(epilogue.dtype),
        options=Epilogue,
    )


def other_dtype(case: Case, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why an implementation whose results are in one of `dtypes` cannot compute `case`, or None."""
    return None if case.option in (None, *map(str, dtypes)) else f"gives no {case.option}"


INT8 = product_op("int8_linear", "blocks", _check_blocks, _shape)
WEIGHT = Op(
    "int8_weight",
    "(Tensor blocks, Tensor weight_scale, ScalarType dtype) -> Tensor",
    lambda blocks, weight_scale, dtype: weight_scale.new_empty(_shape(blocks), dtype=dtype),
    check=_check_weight,
    option=lambda blocks, weight_scale, dtype: str(dtype),
)


@INT8.register(REFERENCE)
def _reference(q: Tensor, blocks: Tensor, epilogue: Epilogue) -> Tensor:
    return scaled_product(q, int8.unpack_int8(blocks), epilogue)


@WEIGHT.register(REFERENCE)
def _weight_reference(blocks: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return rotate_rows(int8.unpack_int8(blocks).to(wide) * weight_scale.unsqueeze(1)).to(dtype)


def _triton_supports(case: Case) -> str | None:
    # Rows and blocks are int8, always; the dtype that varies is the result's.
    return other_dtype(case, GPU_DTYPES) or gpu.supports(replace(case, dtype=torch.float32))


INT8.register(TRITON, _triton_supports)(gpu.deferred("qlinear.triton_int8", "int8_linear"))
WEIGHT.register(TRITON, _triton_supports)(gpu.deferred("qlinear.triton_int8", "int8_weight"))


def _cpp_supports(case: Case) -> str | None:
    return (
        other_dtype(case, (torch.float32, torch.bfloat16))
        or unsupported(case, "cpu", (case.dtype,))
        or native.missing()
    )


@INT8.register(CPP, _cpp_supports)
def _cpu(q: Tensor, blocks: Tensor, epilogue: Epilogue) -> Tensor:
    q, blocks, dtype = q.contiguous(), blocks.contiguous(), epilogue.dtype
    scale, weight_scale = epilogue.scale.contiguous(), epilogue.weight_scale.contiguous()
    bias = None if epilogue.bias is None else epilogue.bias.contiguous()
    out, inputs = _shape(blocks)
    y = torch.empty(len(q), out, dtype=dtype)
    native.module().int8_linear(dtype, q, scale, blocks, weight_scale, bias, y, len(q), inputs, out)
    return y


@WEIGHT.register(CPP, _cpp_supports)
def _weight_cpu(blocks: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    blocks, weight_scale = blocks.contiguous(), weight_scale.contiguous()
    out, inputs = _shape(blocks)
    weight = torch.empty(out, inputs, dtype=dtype)
    native.module().int8_weight(dtype, blocks, weight_scale, weight, inputs, out)
    return weight


def int8_linear(
    q: Tensor, blocks: Tensor, epilogue: Epilogue, *, impl: str | None = None
) -> Tensor:
    """Rows of 8 bits times a weight of 8 bits, transposed: [T, out] in epilogue.dtype.

    q [T, in] int8 and epilogue.scale as `quantize_rows` gives them; blocks [out / 16, in / 4, 64]
    int8 and epilogue.weight_scale as `quantize_weight_int8` does. Sums are exact in 32 bits
    (`fits_int8`). No gradient.
    Raises OpError for shapes and dtypes that do not fit.

    Source: Dettmers et al., arXiv 2208.07339, §2 (vector-wise quantisation).
    """
    result: Tensor = INT8(q, blocks, epilogue, impl=impl)
    return result


def int8_weight(
    blocks: Tensor, weight_scale: Tensor, *, dtype: torch.dtype, impl: str | None = None
) -> Tensor:
    """The weight [out, in] in `dtype` of which "int8-rotated" made blocks and weight_scale.

    As `quantize_weight_int8` gives them; the rotation is taken back, so that the weight is for
    rows as they are. No gradient. Raises OpError for shapes and dtypes that do not fit.
    """
    result: Tensor = WEIGHT(blocks, weight_scale, dtype, impl=impl)
    return result
