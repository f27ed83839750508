"""Gated activation."""

from conftest import cases, provided, random

from gen_fast.ops.swiglu import OP, swiglu
from gen_fast.ops.swiglu.reference import swiglu as plain


def liger(gate_up):
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply(gate_up)


@cases(OP, peers=["liger"])
def bench_swiglu(measure, size, dtype, mode, provider):
    trained = mode != "forward"
    gate_up = random(size.rows, 2 * size.feed_forward, dtype=dtype, grad=trained)
    measure(
        provided(provider, swiglu, plain, {"liger": liger}),
        plain,
        (gate_up,),
        # Forward 3 of the feed-forward width; backward reads 3 and writes 2 more.
        moved_bytes=gate_up.nbytes // 2 * (8 if trained else 3),
        flops=gate_up.numel() // 2 * (35 if trained else 15),
    )
