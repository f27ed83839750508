"""LLM2Vec as tasks of the trainer: masked next-token prediction, SimCSE and the supervised step.

Each trains LoRA factors over a frozen backbone that attends to all tokens, and leaves an adapter as
PEFT writes it. A step goes on from another's result by naming it as its backbone.
Source: LLM2Vec, arXiv 2404.05961.
"""

from pathlib import Path

from gen_fast.training.contrastive import ContrastiveTask
from gen_fast.training.llm2vec_config import LLM2VecConfig
from gen_fast.training.mntp import MNTPTask
from gen_fast.training.trainer import run


def train(config: LLM2VecConfig, *, show_progress_bar: bool | None = None) -> Path:
    """Train one step; return its adapter's directory, <out>/adapter. See trainer.run."""
    task = MNTPTask if config.step == "mntp" else ContrastiveTask
    return run(config, lambda: task.load(config), show_progress_bar=show_progress_bar)
