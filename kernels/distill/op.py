"""Schema, gradient and choice of implementation for distill."""

from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import CPP, REFERENCE, TRITON, Op, gpu, native

from . import chunked, reference

ALIGNMENTS = ("mse", "cosine")

# Bytes of logits at a time. On a CPU an eighth of 1,365 rows of SmolLM2's vocabulary in bfloat16,
# at some loss of speed (training takes more, see step.py); a GPU needs the gradient of some
# thousand rows at once (7,000 of Qwen3's vocabulary in bfloat16) to have a tile for each of its
# processors.
# On a CPU with AMX the products take up to 4 MiB of their own beside a chunk's logits.
CPU_MEMORY, GPU_MEMORY = 12 << 20, 2 << 30

OP = Op(
    "distill",
    "(Tensor hidden, Tensor head, Tensor targets, Tensor student, Tensor teacher, float tokens,"
    " float texts, str kind, int memory, bool gradients) -> (Tensor, Tensor, Tensor)",
    lambda hidden, head, targets, student, *rest: (
        hidden.new_empty(2, dtype=torch.promote_types(hidden.dtype, torch.float32)),
        hidden.new_empty(hidden.shape if rest[-1] else (0, hidden.shape[1])),
        student.new_empty(student.shape),
    ),
)
# The gradients are computed with the losses; the backward pass only scales them.
OP.backward = OP
OP.register(REFERENCE)(reference.distill)


@OP.register(TRITON, gpu.supports)
def _triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_kernel

    return chunked.distill(triton_kernel.row_loss, *inputs)


@OP.register(CPP, native.cpp)
def _cpu(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return chunked.distill(_cpu_row_loss, *inputs)


def _cpu_row_loss(logits: Tensor, targets: Tensor, losses: Tensor) -> None:
    wrong = native.module().cross_entropy(
        logits.dtype == torch.bfloat16,
        *map(native.address, (logits, targets, losses)),
        *logits.shape,
    )
    if wrong >= 0:
        raise OpError(f"target {int(targets[wrong])} is not one of 0 … {logits.shape[1] - 1}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    to_hidden, to_student = ctx.saved_tensors
    by_hidden = to_hidden * grad[0].to(to_hidden.dtype) if ctx.needs_input_grad[0] else None
    by_student = to_student * grad[1].to(to_student.dtype) if ctx.needs_input_grad[3] else None
    return by_hidden, None, None, by_student, *(None,) * 6


OP.differentiate(_save, _gradient)


def distill(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    student: Tensor,
    teacher: Tensor,
    *,
    tokens: float | None = None,
    texts: float | None = None,
    alignment: str = "mse",
    memory: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The two losses of LLM2Vec-Gen as scalars: (reconstruction, alignment).

    hidden [N, h]: final-norm states at the rows that predict answer tokens, and only those.
    head [V, h]: the frozen output matrix; it gets no gradient. targets [N]: int64, the answers.
    student, teacher [B, d]: embeddings of the queries, and the teacher's of their answers.
    tokens, texts: what the sums over rows and texts are divided by; N and B by default. With the
    counts of the whole batch, sums over its parts (micro-batches, ranks) are exact means.
    alignment: "mse", the mean over texts and dimensions, or "cosine", the mean of 1 - cosine.
    memory: bytes for logits, by default 12 MiB on a CPU and 2 GiB on a GPU; more of them are never
    stored, except by the reference.
    Gradients reach `hidden` and `student`. Raises OpError for shapes that do not fit, and on a CPU
    for a target that is no row of the head; on a GPU, where asking would stop the host, the loss
    is then NaN.

    Source: LLM2Vec-Gen, arXiv 2603.10913, §3; the chunks after Liger-Kernel, arXiv 2410.10989.
    """
    if alignment not in ALIGNMENTS:
        raise OpError(f"alignment must be one of {', '.join(ALIGNMENTS)}, not {alignment!r}")
    if student.shape != teacher.shape:
        raise OpError(
            f"student embeddings {list(student.shape)} and teacher embeddings"
            f" {list(teacher.shape)} must have one shape"
        )
    if targets.dtype != torch.int64 or hidden.dtype != head.dtype:
        raise OpError(
            f"targets must be int64, not {targets.dtype}, and hidden {hidden.dtype} and head"
            f" {head.dtype} of one dtype"
        )
    if hidden.shape[:1] != targets.shape or hidden.shape[1] != head.shape[1]:
        raise OpError(
            f"hidden {list(hidden.shape)}, head {list(head.shape)} and targets"
            f" {list(targets.shape)} do not fit together"
        )
    if memory is None:
        memory = GPU_MEMORY if hidden.is_cuda else CPU_MEMORY
    losses = OP(
        *(hidden, head, targets, student, teacher),
        float(max(1, hidden.shape[0]) if tokens is None else tokens),
        float(max(1, student.shape[0]) if texts is None else texts),
        *(alignment, memory),
        # Of two products, loss alone takes one.
        torch.is_grad_enabled() and hidden.requires_grad,
        impl=impl,
    )[0]
    return losses[0], losses[1]
