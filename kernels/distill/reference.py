"""The losses of LLM2Vec-Gen in plain torch, with all logits stored."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy


def reconstruction(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy of softmax(hidden · headᵀ) and `targets`."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return cross_entropy((hidden @ head.T).to(wide), targets, reduction="sum")


def alignment(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Sum over texts of the mean squared difference, or of 1 - cosine."""
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    if kind == "cosine":
        return (1 - cosine_similarity(student, teacher, dim=-1)).sum()
    return (student - teacher).square().sum() / max(1, student.shape[1])


def alignment_gradient(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Gradient [B, d] of `alignment` by the student, in the student's dtype."""
    wide = torch.promote_types(student.dtype, torch.float32)
    s, t = student.to(wide), teacher.to(wide)
    if kind == "mse":
        return (2 / max(1, s.shape[1]) * (s - t)).to(student.dtype)
    s_length = torch.linalg.vector_norm(s, dim=-1, keepdim=True).clamp(min=1e-8)
    t_length = torch.linalg.vector_norm(t, dim=-1, keepdim=True).clamp(min=1e-8)
    cosine = (s * t).sum(-1, keepdim=True) / (s_length * t_length)
    dstudent: Tensor = (cosine * s / s_length - t / t_length) / s_length
    return dstudent.to(student.dtype)


def reconstruction_and_gradient(
    hidden: Tensor, head: Tensor, targets: Tensor, tokens: float, memory: int, gradients: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by `hidden` if asked for. See `op.reconstruction`."""
    loss = reconstruction(hidden, head, targets) / tokens
    if not gradients:
        return loss, hidden.new_empty(0, hidden.shape[1])
    # The gradient of cross-entropy by the logits: softmax - one-hot.
    dlogits = (hidden @ head.T).to(loss.dtype).softmax(-1)
    dlogits[torch.arange(len(targets), device=targets.device), targets] -= 1
    return loss, dlogits.to(hidden.dtype) @ head / tokens


def alignment_and_gradient(
    student: Tensor, teacher: Tensor, texts: float, kind: str
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by `student`. See `op.alignment`."""
    gradient = alignment_gradient(student, teacher, kind)
    return alignment(student, teacher, kind) / texts, gradient / texts
