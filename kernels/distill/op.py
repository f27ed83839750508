"""Schemas, gradients and choice of implementation for distill."""

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

# Results: the loss, and its gradient, so that the backward pass only scales it.
OP = Op(
    "reconstruction",
    "(Tensor hidden, Tensor head, Tensor targets, float tokens, int memory, bool gradients)"
    " -> (Tensor, Tensor)",
    lambda hidden, head, targets, tokens, memory, gradients: (
        hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32)),
        hidden.new_empty(hidden.shape if gradients else (0, hidden.shape[1])),
    ),
)
ALIGNMENT = Op(
    "alignment",
    "(Tensor student, Tensor teacher, float texts, str kind) -> (Tensor, Tensor)",
    lambda student, teacher, texts, kind: (
        student.new_empty((), dtype=torch.promote_types(student.dtype, torch.float32)),
        student.new_empty(student.shape),
    ),
)
OP.backward, ALIGNMENT.backward = OP, ALIGNMENT
OP.register(REFERENCE)(reference.reconstruction_and_gradient)
ALIGNMENT.register(REFERENCE)(reference.alignment_and_gradient)


@OP.register(TRITON, gpu.supports)
def _triton(
    hidden: Tensor, head: Tensor, targets: Tensor, tokens: float, memory: int, gradients: bool
) -> tuple[Tensor, Tensor]:
    from . import triton_kernel

    row_loss = triton_kernel.row_loss
    return chunked.reconstruction(row_loss, hidden, head, targets, tokens, memory, gradients)


@OP.register(CPP, native.cpp)
def _cpp(
    hidden: Tensor, head: Tensor, targets: Tensor, tokens: float, memory: int, gradients: bool
) -> tuple[Tensor, Tensor]:
    return chunked.reconstruction(_cpp_row_loss, hidden, head, targets, tokens, memory, gradients)


def _cpp_row_loss(logits: Tensor, targets: Tensor, losses: Tensor) -> None:
    bad_row = native.module().cross_entropy(logits.dtype, logits, targets, losses, *logits.shape)
    if bad_row >= 0:
        raise OpError(f"target {int(targets[bad_row])} is not one of 0 … {logits.shape[1] - 1}")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.others = len(inputs) - 1


def _gradient(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    scaled = gradient * dloss.to(gradient.dtype) if ctx.needs_input_grad[0] else None
    return scaled, *(None,) * ctx.others


OP.differentiate(_save, _gradient)
ALIGNMENT.differentiate(_save, _gradient)


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

    The arguments are those of the two functions; `alignment` is the kind. With the counts of the
    whole batch as tokens and texts, sums over its parts (micro-batches, ranks) are exact means.

    Source: LLM2Vec-Gen, arXiv 2603.10913, §3.
    """
    aligned = _alignment(student, teacher, texts=texts, kind=alignment)
    return reconstruction(hidden, head, targets, tokens=tokens, memory=memory, impl=impl), aligned


def reconstruction(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    tokens: float | None = None,
    memory: int | None = None,
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden · headᵀ) and the targets: a scalar, float32 at least.

    hidden [N, h]: final-norm states at the rows that predict answer tokens, and only those.
    head [V, h]: the frozen output matrix; it gets no gradient. targets [N]: int64, the answers.
    tokens: what the sum over rows is divided by; N by default.
    memory: bytes for logits, by default 12 MiB on a CPU and 2 GiB on a GPU; more of them are never
    stored, except by the reference.
    Gradients reach `hidden`. Raises OpError for shapes that do not fit, and on a CPU for a target
    that is no row of the head; on a GPU, where asking would stop the host, the loss is then NaN.

    Source: LLM2Vec-Gen, arXiv 2603.10913, §3; the chunks after Liger-Kernel, arXiv 2410.10989.
    """
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
    loss: Tensor = OP(
        hidden,
        head,
        targets,
        float(max(1, hidden.shape[0]) if tokens is None else tokens),
        memory,
        # Of two products, loss alone takes one.
        torch.is_grad_enabled() and hidden.requires_grad,
        impl=impl,
    )[0]
    return loss


def alignment(
    student: Tensor, teacher: Tensor, *, texts: float | None = None, kind: str = "mse"
) -> Tensor:
    """How far the student's embeddings are from the teacher's: a scalar, float32 at least.

    student, teacher [B, d]: embeddings of the queries, and the teacher's of their answers.
    kind: "mse", the mean over dimensions, or "cosine", 1 - cosine; summed over the texts.
    texts: what the sum is divided by; B by default.
    Gradients reach `student`. Raises OpError for shapes that do not fit. In torch everywhere: of a
    training step it is nothing.

    Source: LLM2Vec-Gen, arXiv 2603.10913, §3.
    """
    if kind not in ALIGNMENTS:
        raise OpError(f"alignment must be one of {', '.join(ALIGNMENTS)}, not {kind!r}")
    if student.shape != teacher.shape:
        raise OpError(
            f"student embeddings {list(student.shape)} and teacher embeddings"
            f" {list(teacher.shape)} must have one shape"
        )
    texts = float(max(1, student.shape[0]) if texts is None else texts)
    loss: Tensor = ALIGNMENT(student, teacher, texts, kind, impl=REFERENCE)[0]
    return loss


_alignment = alignment  # within `distill` the name is the kind's
