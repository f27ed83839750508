"""Dropout of rows in Triton, and the choice of what is dropped, which attention's kernels share."""

import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.layout import adjacent

from .philox import threshold, words_of

BLOCK = 1024


@triton.jit
def kept(seed, c0, c1, c2, c3, first_kept):
    """Which elements are kept, [..., 4]: the four words of each counter.

    The counters broadcast: the first rounds are of the smaller shapes.
    """
    a, b, c, d = tl.philox(seed, c0, c1, c2, c3)
    first_kept = first_kept.to(tl.uint32)
    # join puts beside each other: (a, c) and (b, d) become (a, b), (c, d).
    return tl.join(
        tl.join(a >= first_kept, c >= first_kept), tl.join(b >= first_kept, d >= first_kept)
    )


@triton.jit(do_not_specialize=gpu.PER_BATCH)
def _dropout(
    x, text_keys, positions, out, size, stride, seed, first_kept, scale, stream,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < size
    position = tl.load(positions + row).to(tl.int32)
    counters = start // 4 + tl.arange(0, BLOCK // 4)  # [BLOCK / 4]
    # ROWS, the highest bit, sets the streams of rows apart from the layers of attention.
    c2 = stream.to(tl.uint32) | 0x80000000
    keep = kept(seed, counters, position, c2, tl.load(text_keys + row), first_kept)
    values = tl.load(x + row * stride + columns, mask=inside).to(tl.float32)
    result = tl.where(keep.reshape(BLOCK), values * scale, 0.0)
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=inside)


def dropout(
    x: Tensor, text_keys: Tensor, positions: Tensor, p: float, seed: int, stream: int
) -> Tensor:
    """See `op.dropout`."""
    x = adjacent(x)
    rows, size = x.shape
    out = x.new_empty(rows, size)
    if out.numel():
        gpu.launch(
            _dropout,
            (rows, triton.cdiv(size, BLOCK)),
            x,
            words_of(text_keys),
            positions.contiguous(),
            out,
            size,
            x.stride(0),
            seed,
            threshold(p),
            1 / (1 - p),
            stream,
            BLOCK=BLOCK,
        )
    return out
