"""Gated activation, and the same with its rows quantised to int8."""

from conftest import cases, provided, random, rows_of

from gen_fast.ops.qlinear.reference import dequantize_rows
from gen_fast.ops.swiglu import OP, QUANTIZED, swiglu, swiglu_quantized
from gen_fast.ops.swiglu.reference import swiglu as plain
from gen_fast.ops.swiglu.reference import swiglu_quantized as plain_quantized


def liger(gate_up):
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply(gate_up)


@cases(OP, peers=["liger"])
def bench_swiglu(measure, size, dtype, mode, provider):
    trained = mode != "forward"
    rows = rows_of(size, 2 * size.feed_forward, dtype)
    gate_up = random(rows, 2 * size.feed_forward, dtype=dtype, grad=trained)
    measure(
        provided(provider, swiglu, plain, {"liger": liger}),
        plain,
        (gate_up,),
        # Forward 3 of the feed-forward width; backward reads 3 and writes 2 more.
        moved_bytes=gate_up.nbytes // 2 * (8 if trained else 3),
        flops=gate_up.numel() // 2 * (35 if trained else 15),
    )


@cases(QUANTIZED, modes=("forward",))
def bench_swiglu_quantized(measure, size, dtype, mode, provider):
    rows = rows_of(size, 2 * size.feed_forward, dtype)
    gate_up = random(rows, 2 * size.feed_forward, dtype=dtype)
    values = gate_up.numel() // 2
    measure(
        provided(provider, swiglu_quantized, plain_quantized),
        plain_quantized,
        (gate_up, "int8"),
        moved_bytes=gate_up.nbytes + values + 4 * rows,
        flops=18 * values,
        exact=lambda gate_up, _: plain(gate_up),
        compared=lambda q, scale: (dequantize_rows(q, scale),),
    )
