"""Both losses and their gradients: the answer rows of a training batch against a frozen head."""

from functools import partial

import torch
from conftest import DEVICE, cases, provided, random

from gen_fast.ops.distill import OP, distill
from gen_fast.ops.distill.reference import alignment, reconstruction
from gen_fast.training.step import CPU_LOGITS

ROWS = 1536 if DEVICE == "cpu" else 4096  # 8 (or 21) answers of 192 tokens
TEXTS, TEACHER = 8, 384
# The C++ op with the memory that training gives it on a CPU.
TRAINING = "cpu-training"


def plain(hidden, head, targets, student, teacher):
    return (
        reconstruction(hidden, head, targets) / ROWS,
        alignment(student, teacher, "mse") / TEXTS,
    )


def liger(hidden, head, targets, student, teacher):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss = LigerFusedLinearCrossEntropyFunction.apply(hidden, head, targets)[0]
    return loss, alignment(student, teacher, "mse") / TEXTS


def cut_cross_entropy(hidden, head, targets, student, teacher):
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(hidden, head, targets)
    return loss, alignment(student, teacher, "mse") / TEXTS


@cases(
    OP,
    modes=("forward+backward",),
    peers=["liger", "cut-cross-entropy"],
    others=[TRAINING] if DEVICE == "cpu" else [],
)
def bench_distill(measure, size, dtype, mode, provider):
    hidden = random(ROWS, size.hidden, dtype=dtype, grad=True)
    head = random(size.vocabulary, size.hidden, dtype=dtype, scale=size.hidden**-0.5)
    targets = torch.arange(ROWS, device=DEVICE) * 7919 % size.vocabulary
    student = random(TEXTS, TEACHER, dtype="fp32", grad=True)
    teacher = random(TEXTS, TEACHER, dtype="fp32", scale=0.9)
    product = 2 * ROWS * size.hidden * size.vocabulary
    measure(
        provided(
            provider,
            distill,
            plain,
            {
                "liger": liger,
                "cut-cross-entropy": cut_cross_entropy,
                TRAINING: partial(distill, impl="cpu", memory=CPU_LOGITS),
            },
        ),
        plain,
        (hidden, head, targets, student, teacher),
        moved_bytes=2 * head.nbytes + 3 * hidden.nbytes,
        flops=2 * product,
    )
