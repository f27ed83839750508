"""Residual add + RMSNorm, and the same with its rows quantised to int8."""

from conftest import cases, provided, random, rows_of

from gen_fast.ops.norm import OP, QUANTIZED, add_rms_norm, add_rms_norm_quantized
from gen_fast.ops.norm.reference import add_rms_norm as plain_norm
from gen_fast.ops.norm.reference import add_rms_norm_quantized as plain_quantized
from gen_fast.ops.qlinear.reference import dequantize_rows


def plain(x, residual, weight):
    return plain_norm(x, residual, weight, 1e-6)


def liger(x, residual, weight):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, 1e-6)


@cases(OP, peers=["liger"])
def bench_norm(measure, size, dtype, mode, provider):
    trained = mode != "forward"
    rows = rows_of(size, size.hidden, dtype)
    x = random(rows, size.hidden, dtype=dtype, grad=trained)
    residual = random(rows, size.hidden, dtype=dtype, scale=0.5, grad=trained)
    weight = random(size.hidden, dtype=dtype)
    measure(
        provided(
            provider,
            # In place, as the backbone calls it without gradients; torch.compile fuses its own.
            lambda x, r, w, impl: add_rms_norm(x, r, w, 1e-6, inplace=not trained, impl=impl),
            plain,
            {"liger": liger},
        ),
        plain,
        (x, residual, weight),
        moved_bytes=x.nbytes * (8 if trained else 4),
        flops=x.numel() * (15 if trained else 5),
    )


@cases(QUANTIZED, modes=("forward",))
def bench_norm_quantized(measure, size, dtype, mode, provider):
    rows = rows_of(size, size.hidden, dtype)
    x = random(rows, size.hidden, dtype=dtype)
    residual = random(rows, size.hidden, dtype=dtype, scale=0.5)
    weight = random(size.hidden, dtype=dtype)
    measure(
        provided(provider, add_rms_norm_quantized, plain_quantized),
        plain_quantized,
        (x, residual, weight, 1e-6, "int8"),
        moved_bytes=3 * x.nbytes + x.numel() + 4 * rows,
        flops=8 * x.numel(),
        exact=lambda x, residual, weight, eps, _: plain_norm(x, residual, weight, eps),
        compared=lambda q, scale, total: (dequantize_rows(q, scale), total),
    )
