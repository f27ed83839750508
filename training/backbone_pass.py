"""A frozen backbone with an update in training and special tokens, run over texts of a step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch
from gen_fast.model.dropout import Dropout
from gen_fast.model.full import FullWeights
from gen_fast.model.lora import Lora
from gen_fast.model.token_budget import TokenBudget, saved_bytes_per_token
from gen_fast.ops.norm import rms_norm

# Tokens with gradient at a time; an update saves about twice what a frozen layer does.
CPU_TOKENS = 1024
# On a CPU what a batch fit for the caches saves is little beside the memory there is: so many times
# that is kept before texts are rather run twice.
CPU_KEPT = 4
GPU_TOKENS = (32768, 16384, 8192, 4096, 2048, 1024)

Block = tuple[int, int]
"""(first, after): positions of the special tokens of a text under the GEM mask."""


class TrainedBackbone:
    """How texts are run in training.

    mask: of attention. special [k, h]: trained embeddings of ids V, V + 1, … .
    update: what is trained of the linears. attention_dropout: of attention's weights; that of LoRA
    is in its config.
    recompute: layers are run again for the backward pass. budget: tokens with gradient at a time.
    """

    def __init__(
        self,
        backbone: Backbone,
        update: Lora | FullWeights,
        *,
        mask: str,
        special: nn.Parameter | None = None,
        attention_dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        self.backbone = backbone
        self._update = update
        self._special = special
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
            reserved=self._bytes_to_come,
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What gradients reach."""
        special = () if self._special is None else (self._special,)
        return [*self._update.parameters(), *special]

    @property
    def _bytes_to_come(self) -> int:
        """What training will allocate beside activations.

        Of float32: gradients, those of a part, and AdamW's two moments; and a copy of the
        parameters in the dtype of a pass.
        """
        size = 4 * 4 + self.backbone.embedding.element_size()
        return size * sum(parameter.numel() for parameter in self.parameters)

    def kept_tokens(self, asked: int | None) -> int:
        """How many tokens' activations may wait for a backward pass; `asked`, if that is given."""
        kept = CPU_KEPT if asked is None and self.backbone.device.type == "cpu" else 1
        return kept * self.budget.limit(asked)

    def states(
        self,
        texts: Sequence[np.ndarray],
        keys: Sequence[int],
        seed: int | None,
        needed: Sequence[int] | None = None,
        blocks: Sequence[Block | None] | None = None,
    ) -> Tensor:
        """Final-norm states [R, h] of the last `needed[i]` tokens of each text, or of all.

        keys: a number for each text; dropout follows from it, the seed and the place in the text,
        whatever else is in the batch. seed: None for no dropout. blocks: the special tokens of each
        text, None for none; they mean something to the GEM mask alone.
        """
        backbone = self.backbone
        packed_blocks = None
        if self._mask == "gem":
            packed_blocks = [block or (0, 0) for block in blocks or [None] * len(texts)]
        batch = PackedBatch.pack(texts, needed=needed, blocks=packed_blocks, device=backbone.device)
        stream = backbone.forward(
            batch,
            special=self._special,
            mask=self._mask,
            update=self._update,
            dropout=None if seed is None else Dropout(seed, keys, self._attention_dropout),
            recompute=self._recompute and torch.is_grad_enabled(),
        )
        return rms_norm(stream, backbone.final_norm, backbone.config.norm_eps)

    @torch.no_grad()
    def base_states(self, texts: Sequence[np.ndarray]) -> Tensor:
        """Final-norm states [T, h] that the backbone has of texts without what is trained.

        Under the causal mask.
        """
        backbone = self.backbone
        stream = backbone.forward(PackedBatch.pack(texts, device=backbone.device))
        return rms_norm(stream, backbone.final_norm, backbone.config.norm_eps)
