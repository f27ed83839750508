"""Cross-entropy against a large vocabulary, a chunk of rows at a time.

The head is frozen, so the only gradient is that of the hidden rows: softmax minus one-hot, times
the head. A chunk's logits become that difference in place and are multiplied at once; they never
exist for more than one chunk. The head is read twice a chunk, so chunks are as large as the
memory allows; they do not depend on the vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gen_fast.ops.dense import by_onednn, product

# (logits [n, V], targets [n], losses [n]): writes the loss of each row, and softmax - one-hot in
# place of the logits.
RowLoss = Callable[[Tensor, Tensor, Tensor], None]


def chunk_rows(rows: int, vocabulary: int, element_size: int, memory: int) -> int:
    """Rows of a chunk whose logits fit `memory` bytes: at least one, all chunks about equal."""
    most = max(1, memory // (vocabulary * element_size))
    return -(-rows // -(-rows // most))


def reconstruction(
    row_loss: RowLoss,
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    tokens: float,
    memory: int,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by `hidden` if asked for. See `op.reconstruction`."""
    rows, vocabulary = hidden.shape[0], head.shape[0]
    targets = targets.contiguous()
    losses = hidden.new_zeros(rows, dtype=torch.float32)
    dhidden = hidden.new_empty(rows if gradients else 0, hidden.shape[1])
    if rows:
        size = chunk_rows(rows, vocabulary, hidden.element_size(), memory)
        multiply, multiply_back = _products(hidden, head, size, tokens)
        for start in range(0, rows, size):
            chunk = slice(start, min(start + size, rows))
            logits = multiply(hidden[chunk])
            row_loss(logits, targets[chunk], losses[chunk])
            if gradients:
                multiply_back(logits, dhidden[chunk])
            del logits  # before those of the next chunk are there
    return losses.sum() / tokens, dhidden


def _products(
    hidden: Tensor, head: Tensor, size: int, tokens: float
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], object]]:
    """(rows of `hidden` → logits), (their gradient, where to write that of the rows / tokens)."""
    if by_onednn(hidden):  # which writes to memory of its own
        return (
            lambda rows: product(rows, head),
            lambda grad, out: torch.div(product(grad, head.T), tokens, out=out),
        )
    buffer = hidden.new_empty(size, head.shape[0])
    return (
        lambda rows: torch.mm(rows, head.T, out=buffer[: len(rows)]),
        # The scale belongs here: in float16 it would make small probabilities vanish.
        lambda grad, out: torch.addmm(out, grad, head, beta=0, alpha=1 / tokens, out=out),
    )
