"""Rows to int8, and products with weights of 4 and of 8 bits, beside torch's with plain ones."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import DEVICE, DTYPES, cases, provided, random, rows_of

from gen_fast.ops.qlinear import (
    FP8,
    INT4,
    INT8,
    INT8_GROUP,
    OP,
    dequantize_groups,
    fp8_linear,
    group_linear,
    int8_linear,
    quantize_groups,
    quantize_rows,
    quantize_weight_fp8,
    quantize_weight_int8,
    unpack_int8,
)
from gen_fast.ops.qlinear.fp8_op import scaled_mm
from gen_fast.ops.qlinear.reference import Epilogue, dequantize_rows, scaled_product
from gen_fast.ops.qlinear.reference import quantize_rows as plain

# For one query and a few, and for a batch: on a GPU as many rows as the size has.
ROWS = ["1 row", "16 rows", "64 rows", "batch"] if DEVICE == "cuda" else ["16 rows", "2048 rows"]


@cases(OP, modes=("forward",))
def bench_qlinear(measure, size, dtype, mode, provider):
    rows = rows_of(size, size.feed_forward, dtype)
    x = random(rows, size.feed_forward, dtype=dtype)
    measure(
        provided(provider, quantize_rows, plain),
        plain,
        (x, "int8"),
        moved_bytes=x.nbytes + x.numel() + 4 * rows,
        flops=3 * x.numel(),
        exact=lambda x, _: x,
        compared=lambda q, scale: (dequantize_rows(q, scale),),
    )


@pytest.mark.parametrize("case", ROWS)
@cases(INT4, modes=("forward",), others=("linear",))
def bench_int4_linear(measure, size, dtype, mode, provider, case):
    """Gate and up of one layer. "linear": torch's, of the same values as a matrix."""
    measure_groups(measure, size, dtype, provider, case, bits=4)


@pytest.mark.parametrize("case", ROWS)
@cases(INT8_GROUP, modes=("forward",), others=("linear",))
def bench_int8_group_linear(measure, size, dtype, mode, provider, case):
    """The same in 8 bits."""
    measure_groups(measure, size, dtype, provider, case, bits=8)


def measure_groups(measure, size, dtype, provider, case, bits):
    shape, rows = (2 * size.feed_forward, size.hidden), rows_in(case, size)
    blocks = quantize_groups(random(*shape, dtype="fp32", scale=0.05), bits)
    x = random(rows, size.hidden, dtype=dtype)
    weight = dequantize_groups(blocks, x.dtype) if provider == "linear" else None
    measure(
        provided(provider, group_linear, plain_groups, {"linear": lambda x, blocks: x @ weight.T}),
        plain_groups,
        (x, blocks),
        moved_bytes=x.nbytes + blocks.nbytes + rows * shape[0] * x.itemsize,
        flops=2 * rows * shape[0] * shape[1],
    )


@pytest.mark.parametrize("case", ROWS)
@cases(INT8, modes=("forward",))
def bench_int8_linear(measure, size, dtype, mode, provider, case):
    """The same layer on rows that are of 8 bits already."""
    shape, rows = (2 * size.feed_forward, size.hidden), rows_in(case, size)
    q, scale = quantize_rows(random(rows, size.hidden, dtype="fp32"))
    blocks, weight_scale = quantize_weight_int8(random(*shape, dtype="fp32", scale=0.05))
    run = provided(provider, int8_linear, plain_int8)
    epilogue = Epilogue(scale, weight_scale, None, DTYPES[dtype])
    measure_product(measure, run, plain_int8, q, blocks, epilogue)


@pytest.mark.parametrize("case", ROWS)
@cases(FP8, modes=("forward",), others=("fast sums",) if DEVICE == "cuda" else ())
def bench_fp8_linear(measure, size, dtype, mode, provider, case):
    """The same in fp8. "fast sums": what use_fast_accum gains."""
    shape, rows = (2 * size.feed_forward, size.hidden), rows_in(case, size)
    q, scale = quantize_rows(random(rows, size.hidden, dtype="fp32"), "fp8")
    weight, weight_scale = quantize_weight_fp8(random(*shape, dtype="fp32", scale=0.05))
    fast = {"fast sums": partial(scaled_mm, fast_sums=True)}
    run = provided(provider, fp8_linear, scaled_product, fast)
    epilogue = Epilogue(scale, weight_scale, None, DTYPES[dtype])
    measure_product(measure, run, scaled_product, q, weight, epilogue)


def measure_product(measure, run, plain, q, weight, epilogue):
    """A layer on 8 bits: rows q [N, in] and a weight."""
    outputs = len(epilogue.weight_scale)
    measure(
        run,
        plain,
        (q, weight, epilogue),
        moved_bytes=q.nbytes + weight.nbytes + len(q) * outputs * epilogue.dtype.itemsize,
        flops=2 * q.numel() * outputs,
        operand_bytes=1,
        exact=lambda q, weight, epilogue: plain(q, weight, replace(epilogue, dtype=torch.float64)),
    )


def rows_in(case, size):
    """The number of rows of a case."""
    return size.rows if case == "batch" else int(case.split()[0])


def plain_int8(q, blocks, epilogue):
    return scaled_product(q, unpack_int8(blocks), epilogue)


def plain_groups(x, blocks):
    return x @ dequantize_groups(blocks, x.dtype).T
