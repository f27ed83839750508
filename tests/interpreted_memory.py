"""Every load and store of Triton kernels in the interpreter: does it stay within the arguments?

What AddressSanitizer does for the CUDA kernels that run on the CPU: an access outside is an error
even where what was read has no influence and what was written hits nothing that a test looks at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from gen_fast.ops import gpu


class OutOfBoundsError(AssertionError):
    """A kernel reads or writes what belongs to none of its arguments."""


@contextmanager
def checked_memory() -> Iterator[None]:
    """Kernels that `gpu.launch` runs inside raise OutOfBoundsError at the first access outside.

    Outside is every byte that is no element of a tensor that this launch was given: also the rest
    of a view's storage, and what lies between its rows. (One argument's kernel pointer that comes
    to lie within another argument is not seen: pointers do not know theirs.) What a masked load
    without `other` leaves undefined on a GPU, and the interpreter makes 0, is NaN or -1.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    launch = gpu.launch
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    memory: list[tuple[np.ndarray, np.ndarray]] = []  # of the running launch, at most one

    def check(what: str, pointers: Any, mask: Any) -> None:
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if memory and addresses.size:
            beyond = _outside(addresses.astype(np.uint64), width, *memory[-1])
            if beyond.any():
                raise OutOfBoundsError(
                    f"{beyond.sum()} of {addresses.size} elements that a kernel {what} belong to"
                    " none of its arguments"
                )

    def checked_load(
        builder: Any, pointers: Any, mask: Any, other: Any, *options: Any
    ) -> TensorHandle:
        check("reads", pointers, mask)
        if other is None:
            element = pointers.get_element_ty()
            dtype, shape = np.dtype(_get_np_dtype(element)), pointers.data.shape
            undefined = b"\xff" * (dtype.itemsize * pointers.data.size)
            other = TensorHandle(np.frombuffer(undefined, dtype).reshape(shape), element)
        return load(builder, pointers, mask, other, *options)

    def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        check("writes", pointers, mask)
        return store(builder, pointers, value, mask, *options)

    def checked_launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        memory.append(_elements([x for x in arguments if isinstance(x, Tensor)]))
        try:
            launch(kernel, grid, *arguments, **constants)
        finally:
            memory.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        patch.setattr(gpu, "launch", checked_launch)
        yield


def _outside(addresses: np.ndarray, width: int, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which elements of `width` bytes are not within one of the intervals, which do not overlap."""
    first, last = (np.searchsorted(begins, x, "right") for x in (addresses.min(), addresses.max()))
    if first == last and first > 0 and addresses.max() + np.uint64(width) <= ends[first - 1]:
        return np.zeros(1, bool)  # all within one interval: most accesses
    interval = np.searchsorted(begins, addresses, "right")
    return (interval == 0) | (addresses + np.uint64(width) > ends[interval - 1])


def _elements(tensors: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Where the tensors' elements lie: begins and ends of intervals of bytes, in order, apart."""
    begins, ends = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for x in tensors:
        if x.numel():
            run, offsets = x.element_size(), np.zeros(1, np.uint64)
            for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
                if size > 1 and len(offsets) == 1 and stride * x.element_size() == run:
                    run *= size
                elif size > 1 and stride:
                    steps = np.arange(size, dtype=np.uint64) * np.uint64(stride * x.element_size())
                    offsets = (offsets[None, :] + steps[:, None]).ravel()
            begins.append(offsets + np.uint64(x.data_ptr()))
            ends.append(begins[-1] + np.uint64(run))
    begin, end = np.concatenate(begins), np.concatenate(ends)
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], np.maximum.accumulate(end[order])
    if not len(begin):
        return begin, end
    # Views of one storage touch or overlap: then they are one interval.
    new = np.concatenate([[True], begin[1:] > end[:-1]])
    last = np.concatenate([new[1:], [True]])
    return begin[new], end[last]
