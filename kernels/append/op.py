"""Schemas, gradient and choice of implementation for append."""

from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, CUDA, REFERENCE, TRITON, Op, gpu, native

from . import reference


def _check(table: Tensor, special: Tensor | None, ids: Tensor) -> None:
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise OpError(f"ids must be a vector of int64, not {list(ids.shape)} of {ids.dtype}")
    if special is not None and special.shape[1:] != table.shape[1:]:
        raise OpError(
            f"special tokens {list(special.shape)} must be as wide as the table {list(table.shape)}"
        )


BACKWARD = Op(
    "append_backward",
    "(Tensor grad, Tensor ids, int vocabulary, int special) -> Tensor",
    lambda grad, ids, vocabulary, special: grad.new_empty(
        special, grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32)
    ),
)
OP = Op(
    "append",
    "(Tensor table, Tensor? special, Tensor ids) -> Tensor",
    lambda table, special, ids: table.new_empty(ids.shape[0], table.shape[1]),
    BACKWARD,
    _check,
)
OP.register(REFERENCE)(reference.append)
BACKWARD.register(REFERENCE)(reference.append_backward)


# Registered before Triton's, so chosen only when asked for: which of the two is ahead has not been
# measured yet.
@OP.register(CUDA, native.cuda)
def _cuda(table: Tensor, special: Tensor | None, ids: Tensor) -> Tensor:
    table, ids = native.aligned(table), ids.contiguous()
    special = None if special is None else native.aligned(special.to(table.dtype))
    out = table.new_empty(ids.shape[0], table.shape[1])
    if out.numel():
        (vocabulary, size), n_special = table.shape, 0 if special is None else special.shape[0]
        row_bytes, stream = size * table.element_size(), native.stream(table)
        native.cuda_module().append(
            table, special, ids, out, len(ids), vocabulary, n_special, row_bytes, stream
        )
    return out


OP.register(TRITON, gpu.supports)(gpu.deferred("append.triton_kernel", "append"))
BACKWARD.register(TRITON, gpu.supports)(gpu.deferred("append.triton_kernel", "append_backward"))


@OP.register(CPP, native.cpp)
def _cpu(table: Tensor, special: Tensor | None, ids: Tensor) -> Tensor:
    table, ids = table.contiguous(), ids.contiguous()
    rows, (vocabulary, size) = ids.size(0), table.shape
    n_special = 0
    if special is not None:
        n_special = special.size(0)
        special = special if special.dtype == table.dtype else special.to(table.dtype)
        special = special.contiguous()
    out = table.new_empty(rows, size)
    unknown = native.module().append(
        table, special, ids, out, rows, vocabulary, n_special, size * table.element_size()
    )
    if unknown >= 0:
        last = vocabulary + n_special - 1
        raise OpError(f"row {unknown}: id {int(ids[unknown])} is not one of 0 … {last}")
    return out


@BACKWARD.register(CPP, native.cpp)
def _cpu_backward(grad: Tensor, ids: Tensor, vocabulary: int, special: int) -> Tensor:
    grad, ids = grad.contiguous(), ids.contiguous()
    out = grad.new_empty(special, grad.shape[1], dtype=torch.float32)
    rows, size = grad.shape
    native.module().append_backward(grad.dtype, grad, ids, out, rows, vocabulary, special, size)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, special, ids = inputs
    ctx.vocabulary = table.shape[0]
    ctx.special = None if special is None else (special.shape[0], special.dtype)
    ctx.save_for_backward(ids)


def _gradient(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
    if ctx.special is None or not ctx.needs_input_grad[1]:
        return None, None, None
    (ids,) = ctx.saved_tensors
    count, dtype = ctx.special
    total = BACKWARD.in_backward(ctx, grad, ids, ctx.vocabulary, count)
    return None, total.to(dtype), None


OP.differentiate(_save, _gradient)


def append(
    table: Tensor, special: Tensor | None, ids: Tensor, *, impl: str | None = None
) -> Tensor:
    """Embed packed ids: [T, h] in the dtype of `table`.

    table [V, h]: the backbone's embedding rows; frozen, they get no gradient. ids [T]: int64; id
    V + j means row j of `special` [k, h], the trained special tokens, which are not part of any
    vocabulary and so can never be produced by tokenising text. The gradient of `special` is
    summed in float32, in a fixed order.
    Raises OpError for shapes and dtypes that do not fit, and on a CPU for an id that has no row;
    on a GPU, where asking would stop the host, such an id gives zeros.

    Source: LLM2Vec-Gen, arXiv 2603.10913, §3 (special tokens appended to the query).
    """
    result: Tensor = OP(table, special, ids, impl=impl)
    return result
