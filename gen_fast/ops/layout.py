"""How an op wants its inputs to lie in memory."""

from torch import Tensor


def dense_rows(x: Tensor) -> Tensor:
    """`x` [T, N, D] with each row's N·D elements side by side; rows may lie apart. Rarely copies.

    Views of a fused projection pass as they are.
    """
    _, heads_apart, apart = x.stride()
    return x if apart == 1 and heads_apart == x.size(2) else x.contiguous()


def dense_rows_and_stride(x: Tensor, size: int) -> tuple[Tensor, int]:
    """`dense_rows(x)` for heads of `size`, and the elements from a row to the next."""
    stride, heads_apart, apart = x.stride()
    if apart == 1 and heads_apart == size:
        return x, stride
    x = x.contiguous()
    return x, x.stride(0)


def adjacent(x: Tensor) -> Tensor:
    """`x` [T, f] with the elements of a row side by side; rows may lie apart. Rarely copies."""
    return x if x.stride(1) == 1 else x.contiguous()
