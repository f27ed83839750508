"""Gather from two tables in Triton, and the sum of the special rows' gradients without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.layout import adjacent

BLOCK_ROWS = 32
BLOCK_COLUMNS = 128
# Each special row's gradient is summed by this many programs, and their sums by torch: as many as
# fill a GPU, and always the same order of additions.
PARTS = 16


@triton.jit
def _append_forward(
    table, special, ids, out, vocabulary, n_special, size, table_stride, special_stride,
    HAS_SPECIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < size
    token = tl.load(ids + row)
    known = (token >= 0) & (token < vocabulary)
    values = tl.load(table + token * table_stride + columns, mask=inside & known, other=0.0)
    if HAS_SPECIAL:
        at = special + (token - vocabulary) * special_stride + columns
        added = (token >= vocabulary) & (token < vocabulary + n_special)
        values += tl.load(at, mask=inside & added, other=0.0).to(values.dtype)
    tl.store(out + row * size + columns, values, mask=inside)


@triton.jit(do_not_specialize=["special"])
def _append_backward(
    grad, order, starts, out, special, size, grad_stride,
    PARTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)  # [BLOCK_COLUMNS]
    part = tl.program_id(2)
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    first, end = tl.load(starts + token), tl.load(starts + token + 1)
    for start in range(first + part * BLOCK_ROWS, end, PARTS * BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        row = tl.load(order + place, mask=place < end, other=0)
        values = tl.load(  # [BLOCK_ROWS, BLOCK_COLUMNS]
            grad + row[:, None] * grad_stride + columns[None, :],
            mask=(place < end)[:, None] & (columns < size)[None, :],
            other=0.0,
        )
        total += tl.sum(values.to(tl.float32), 0)
    at = out + (part * special + token).to(tl.int64) * size + columns
    tl.store(at, total, mask=columns < size)


def append(table: Tensor, special: Tensor | None, ids: Tensor) -> Tensor:
    """See `op.append`. An id beyond both tables gives a row of zeros: no host sync to refuse it."""
    table = adjacent(table)
    special = None if special is None else adjacent(special)
    rows, size = ids.shape[0], table.shape[1]
    out = table.new_empty(rows, size)
    n_special, stride = (0, 0) if special is None else (special.shape[0], special.stride(0))
    gpu.launch_rows(
        _append_forward,
        (rows, size),
        table,
        special,
        ids.contiguous(),
        out,
        table.shape[0],
        n_special,
        size,
        table.stride(0),
        stride,
        HAS_SPECIAL=special is not None,
    )
    return out


def append_backward(grad: Tensor, ids: Tensor, vocabulary: int, special: int) -> Tensor:
    """Gradient [k, h] of the special rows, float32.

    Sorted by id, the rows of each special token lie together, in the order of the batch: only they
    are read. Neither sorting nor the search stops the host.
    """
    grad = adjacent(grad)
    size = grad.shape[1]
    parts = grad.new_empty(PARTS, special, size, dtype=torch.float32)
    if parts.numel():
        tokens, order = torch.sort(ids, stable=True)
        bounds = torch.arange(vocabulary, vocabulary + special + 1, device=ids.device)
        gpu.launch(
            _append_backward,
            (special, triton.cdiv(size, BLOCK_COLUMNS), PARTS),
            grad,
            order,
            torch.searchsorted(tokens, bounds),
            parts,
            special,
            size,
            grad.stride(0),
            PARTS=PARTS,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=BLOCK_COLUMNS,
        )
    return parts.sum(0)
