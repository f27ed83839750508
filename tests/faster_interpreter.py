"""Triton's interpreter without most of what it does again and again; its results are the same."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


@contextmanager
def faster_interpreter() -> Iterator[None]:
    """Kernels that are interpreted inside take about half of the time."""
    import triton.language as tl
    from triton.language import core
    from triton.runtime import interpreter

    # Its own language for Triton's once, not whenever functions call: at each call it looks through
    # all of the language, and finds nothing that the launch has not replaced.
    both = SimpleNamespace(__globals__={"tl": tl, "core": core})
    replaced = interpreter._patch_lang(both)
    builder = interpreter.interpreter_builder
    # Each operation makes the types of its operands and of its result. Of few shapes: what they
    # hold is made once a shape.
    numpy_dtype, make_block = interpreter._get_np_dtype, core.block_type.__init__

    @cache
    def numpy_dtype_named(name: str) -> np.dtype[Any]:
        return numpy_dtype(core.dtype(name))

    def dtype_in_numpy(dtype: Any) -> np.dtype[Any]:
        scalar = dtype.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else numpy_dtype_named(scalar.name)

    @cache
    def block_of(sizes: tuple[int, ...]) -> Any:
        block = SimpleNamespace()
        make_block(block, core.float32, list(sizes))  # which refuses what cannot be a block's
        return block

    @cache
    def constants(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(n) for n in sizes]), core.constexpr(math.prod(sizes))

    def make_block_again(self: Any, element_ty: Any, shape: Any) -> None:
        block = block_of(tuple([core._unwrap_if_constexpr(size) for size in shape]))
        self.element_ty, self.shape, self.numel = element_ty, block.shape, block.numel
        self.name = f"<{block.shape.values}, {element_ty}>"

    def equal_blocks(self: Any, other: Any) -> bool:
        return (
            isinstance(other, core.block_type)
            and self.shape.values == other.shape.values
            and self.element_ty == other.element_ty
        )

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants(tuple(type.shape.values) if type.is_block() else ())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
        # Whether integers overflow, computed in int64 for an assertion that only debug mode makes.
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter, "_get_np_dtype", dtype_in_numpy)
        patch.setattr(core.block_type, "__init__", make_block_again)
        patch.setattr(core.block_type, "__eq__", equal_blocks)
        patch.setattr(core.tensor, "__init__", make_tensor)
        yield
    replaced.restore()
