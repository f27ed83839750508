"""Rows to int8."""

from conftest import cases, provided, random, rows_of

from gen_fast.ops.qlinear import OP, quantize_rows
from gen_fast.ops.qlinear.reference import dequantize_rows
from gen_fast.ops.qlinear.reference import quantize_rows as plain


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
