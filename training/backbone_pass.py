"""A frozen backbone with trained LoRA factors, run over texts of a step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch
from gen_fast.model.dropout import Dropout
from gen_fast.model.lora import Lora
from gen_fast.model.token_budget import TokenBudget, saved_bytes_per_token
from gen_fast.ops.norm import rms_norm

# Tokens with gradient at a time; LoRA saves about twice what a frozen layer does.
CPU_TOKENS = 1024
# On a CPU what a batch fit for the caches saves is little beside the memory there is: so many times
# that is kept before texts are rather run twice.
CPU_KEPT = 4
GPU_TOKENS = (32768, 16384, 8192, 4096, 2048, 1024)


class TrainedBackbone:
    """How texts are run in training.

    mask: of attention. attention_dropout: of its weights; that of LoRA is in its config.
    recompute: layers are run again for the backward pass. budget: tokens with gradient at a time.
    """

    def __init__(
        self, backbone: Backbone, *, mask: str, attention_dropout: float, recompute: bool
    ) -> None:
        self.backbone = backbone
        self._mask = mask
        self._attention_dropout = attention_dropout
        self._recompute = recompute
        saved = 2 * saved_bytes_per_token(backbone)
        if recompute:  # one layer, and what goes between layers
            config = backbone.config
            between = 2 * config.hidden_size * backbone.embedding.element_size()
            saved = saved // config.num_layers + between * config.num_layers
        self.budget = TokenBudget(
            backbone,
            cpu_tokens=CPU_TOKENS,
            gpu_tokens=GPU_TOKENS,
            bytes_per_token=saved,
        )

    def kept_tokens(self, asked: int | None) -> int:
        """How many tokens' activations may wait for a backward pass; `asked`, if that is given."""
        kept = CPU_KEPT if asked is None and self.backbone.device.type == "cpu" else 1
        return kept * self.budget.limit(asked)

    def states(
        self,
        texts: Sequence[np.ndarray],
        keys: Sequence[int],
        lora: Lora,
        seed: int | None,
        needed: Sequence[int] | None = None,
    ) -> Tensor:
        """Final-norm states [R, h] of the last `needed[i]` tokens of each text, or of all.

        keys: a number for each text; dropout follows from it, the seed and the place in the text,
        whatever else is in the batch. seed: None for no dropout.
        """
        backbone = self.backbone
        batch = PackedBatch.pack(texts, needed=needed, device=backbone.device)
        stream = backbone.forward(
            batch,
            mask=self._mask,
            lora=lora,
            dropout=None if seed is None else Dropout(seed, keys, self._attention_dropout),
            recompute=self._recompute and torch.is_grad_enabled(),
        )
        return rms_norm(stream, backbone.final_norm, backbone.config.norm_eps)
