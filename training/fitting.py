"""The alignment fitted to the frozen backbone in closed form, before training and after it.

The backbone's states at untrained special tokens already tell much about an answer. Ridge
regression finds the best linear map to the teacher's vectors at once; gradient descent needs
hundreds of steps to get as far, and while the special tokens move it is always behind.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gen_fast.errors import NonFiniteLossError
from gen_fast.training.data import Example
from gen_fast.training.student import Student

# Ridge, as a share of the features' mean variance. Of 1e-4 … 1e-1, on SmolLM2 with MiniLM's
# vectors, less overfits and more ranks worse.
RIDGE = 1e-2
BATCH = 64


@torch.no_grad()
def fit_alignment(student: Student, examples: Sequence[Example]) -> None:
    """Fit the alignment projection to the teacher's vectors by ridge regression.

    Rows are the queries of `examples`, and their repeated answers if there are any.
    """
    features, targets = _features(student, examples)  # [rows, h], [rows, d]
    mean, target_mean = features.mean(0), targets.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / len(centred)
    if not torch.isfinite(covariance).all():
        raise NonFiniteLossError(
            "the backbone's states hold NaN or infinity; dtype float32 or bfloat16 may help"
        )
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, centred.T @ (targets - target_mean) / len(centred))
    student.alignment.weight.copy_(weight.T)
    student.alignment.bias.copy_(target_mean - mean @ weight)


def _features(student: Student, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """What the alignment is given and what it should make of it, float64."""
    soft, vectors = [], []
    for start in range(0, len(examples), BATCH):
        batch = examples[start : start + BATCH]
        texts = [(example.query, example.vector) for example in batch]
        texts += [(e.repeat, e.vector) for e in batch if e.repeat is not None]
        prompts, _ = student.encode([ids for ids, _ in texts])
        soft.append(prompts.unflatten(0, (len(texts), student.n_compression)).double().mean(1))
        vectors.append(torch.from_numpy(np.stack([vector for _, vector in texts])))
    return torch.cat(soft), torch.cat(vectors).to(soft[0])
