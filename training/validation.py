"""How good an adapter is on rows it was not trained on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch.nn.functional import normalize

from gen_fast.ops.distill import alignment
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Example
from gen_fast.training.step import reconstruction_loss
from gen_fast.training.student import Student


@dataclass(frozen=True)
class Validation:
    """Losses on held-out rows; mean cosine to the teacher's vectors; and how well a query's
    embedding finds its own answer's teacher vector among all: top1 and mean reciprocal rank.
    """

    reconstruction: float
    alignment: float
    cosine: float
    top1: float
    mrr: float

    def as_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


@torch.no_grad()
def validate(student: Student, examples: Sequence[Example], config: TrainConfig) -> Validation:
    """Evaluate on `examples`, all on this rank."""
    embeddings, recon, tokens = [], 0.0, 0
    for start in range(0, len(examples), config.batch_size):
        batch = examples[start : start + config.batch_size]
        soft, embedded = student.encode([example.query for example in batch])
        embeddings.append(embedded)
        recon += reconstruction_loss(student, soft, batch, config)
        tokens += sum(len(example.answer) for example in batch)
    student_e = torch.cat(embeddings)
    teacher_e = torch.from_numpy(np.stack([example.vector for example in examples])).to(student_e)
    cosines = normalize(student_e, dim=-1) @ normalize(teacher_e, dim=-1).T
    own = cosines.diagonal()
    ranks = 1 + (cosines > own.unsqueeze(1)).sum(1).double()
    texts = len(examples) / student.alignment_factor  # the scale of training's loss
    return Validation(
        reconstruction=recon / max(1, tokens),
        alignment=float(alignment(student_e, teacher_e, texts=texts, kind=config.alignment)),
        cosine=float(own.mean()),
        top1=float((ranks == 1).double().mean()),
        mrr=float((1 / ranks).mean()),
    )
