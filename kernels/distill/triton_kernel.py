"""Cross-entropy of rows of logits and its gradient in place, in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from gen_fast.ops import gpu

BLOCK = 4096


@triton.jit
def _distill_row_loss(logits, targets, losses, vocabulary, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    picked = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    # Online: the largest logit so far, and the sum of exponentials relative to it. One for the row,
    # not one for each lane, so that a block costs one exponential an element.
    peak = float("-inf")
    mass = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = column < vocabulary
        values = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(values, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        mass = mass * tl.exp(peak - shift) + tl.sum(tl.exp(values - shift), 0)
        peak = new_peak
    lse = peak + tl.log(mass)
    tl.store(losses + row, lse - picked)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)  # [BLOCK]
        inside = column < vocabulary
        values = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
        result = tl.exp(values - lse) - tl.where(column == target, 1.0, 0.0)
        tl.store(logits + column, result.to(logits.dtype.element_ty), mask=inside)


def row_loss(logits: Tensor, targets: Tensor, losses: Tensor) -> None:
    """See `chunked.RowLoss`."""
    rows, vocabulary = logits.shape
    gpu.launch(
        _distill_row_loss,
        (rows,),
        logits,
        targets,
        losses,
        vocabulary,
        logits.stride(0),
        BLOCK=BLOCK,
        num_warps=8,
    )
