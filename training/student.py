"""What is trained, and how it is run over the frozen backbone with as little work as possible.

Sizes: B texts, k special tokens, C compression tokens, h hidden, d teacher dimension, V vocabulary,
N answer tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gen_fast.embed.adapter import Adapter
from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch, split_by_budget
from gen_fast.model.kv_cache import KVCache
from gen_fast.model.token_budget import CPU_TOKENS, TokenBudget, saved_bytes_per_token
from gen_fast.ops.norm import rms_norm
from gen_fast.training.config import TrainConfig
from gen_fast.training.special import special_rows

# Queries are run without gradients, in batches as large as encoding's.
GPU_QUERY_TOKENS = 32768
# Tokens of reconstruction at a time, whose activations are kept for the backward pass: 345 kB a
# token for SmolLM2-135M in bfloat16 by the count of saved_bytes_per_token, and twice that in
# float32. There bench/train.py, equal lengths, two rounds each, took 1.9 GB at 512 tokens and was
# 1.65 times as fast as the reference, 2.2 GB and 1.74 times at 768 (commit a018736), 2.4 GB and
# 1.76 times at 1,024 (commit 0705c4d).
CPU_PART_TOKENS = {torch.bfloat16: 1024, torch.float16: 1024, torch.float32: 768}
# On a GPU the largest of these that fits in half of the memory that the weights leave.
GPU_PART_TOKENS = (16384, 8192, 4096, 2048, 1024, 512)


class Student(nn.Module):
    """Special tokens and the two projections, in float32; the backbone is shared and frozen.

    special [k, h]: drawn from the distribution of the rows of the backbone's embedding table, or
    all at its mean row (config.special_init); reconstruction: h -> h; alignment: h -> d.
    teacher_variance: of the teacher's vectors, the mean over its dimensions.
    Source: LLM2Vec-Gen, arXiv 2603.10913, §3.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Tensor,
        dimension: int,
        config: TrainConfig,
        teacher_variance: float = 1.0,
    ) -> None:
        super().__init__()
        self.alignment_factor = config.alignment_factor(dimension, teacher_variance)
        self.backbone = backbone
        self.head = head
        self.n_compression = config.n_compression
        self.part_budget = TokenBudget(
            backbone,
            cpu_tokens=CPU_PART_TOKENS.get(backbone.dtype, min(CPU_PART_TOKENS.values())),
            gpu_tokens=GPU_PART_TOKENS,
            bytes_per_token=saved_bytes_per_token(backbone),
        )
        h = backbone.config.hidden_size
        generator = torch.Generator().manual_seed(config.seed)
        special = special_rows(backbone.embedding, config.n_special, config.special_init, generator)
        self.special = nn.Parameter(special.to(backbone.device))
        self.reconstruction = _linear(h, h, generator).to(backbone.device)
        self.alignment = _linear(h, dimension, generator).to(backbone.device)

    def encode(self, queries: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Soft prompts [B · C, h] and embeddings [B, d], float32, of queries given as ids.

        The queries themselves are run without gradient and their keys and values kept: nothing in
        them depends on what is trained.
        """
        backbone, k = self.backbone, len(self.special)
        cache = backbone.new_cache([len(ids) + k for ids in queries])
        self._prefill(queries, cache)
        vocabulary = backbone.config.vocab_size
        specials = np.arange(vocabulary, vocabulary + k)
        batch = PackedBatch.pack(
            [specials] * len(queries),
            needed=[self.n_compression] * len(queries),
            prefix_length=cache.lengths,
            device=backbone.device,
        )
        stream = backbone.forward(batch, special=self.special, cache=cache)
        soft = self.reconstruction(self._final_norm(stream).float())
        # A is linear, so the mean of its results is its result for the mean.
        mean = soft.unflatten(0, (len(queries), self.n_compression)).mean(1)
        return soft, self.alignment(mean)

    @torch.no_grad()
    def _prefill(self, queries: Sequence[np.ndarray], cache: KVCache) -> None:
        budget = CPU_TOKENS if self.backbone.device.type == "cpu" else GPU_QUERY_TOKENS
        everyone = cache.active
        for part in split_by_budget([len(ids) for ids in queries], budget):
            cache.active = everyone[part]
            texts = queries[part]
            batch = PackedBatch.pack(texts, needed=[0] * len(texts), device=self.backbone.device)
            self.backbone.forward(batch, cache=cache)
        cache.active = everyone

    def answer_states(self, soft: Tensor, answers: Sequence[np.ndarray]) -> Tensor:
        """Final-norm states [N, h] at the rows that predict the answers' tokens.

        soft [B · C, h] stands before each answer; its last row predicts the first token. The last
        token predicts nothing and is not run.
        """
        backbone, c = self.backbone, self.n_compression
        vocabulary = backbone.config.vocab_size
        rows = [
            np.concatenate((np.arange(vocabulary + i * c, vocabulary + (i + 1) * c), ids[:-1]))
            for i, ids in enumerate(answers)
        ]
        batch = PackedBatch.pack(rows, needed=[len(ids) for ids in answers], device=backbone.device)
        return self._final_norm(backbone.forward(batch, special=soft))

    def _final_norm(self, stream: Tensor) -> Tensor:
        return rms_norm(stream, self.backbone.final_norm, self.backbone.config.norm_eps)

    def to_adapter(self, config: TrainConfig) -> Adapter:
        """The trained tensors, as the encoder loads them."""

        def pair(layer: nn.Linear) -> tuple[Tensor, Tensor]:
            return layer.weight.detach().cpu().clone(), layer.bias.detach().cpu().clone()

        return Adapter(
            special=self.special.detach().cpu().clone(),
            n_compression=self.n_compression,
            backbone=config.backbone,
            backbone_revision=config.backbone_revision,
            fingerprint=self.backbone.fingerprint,
            reconstruction=pair(self.reconstruction),
            alignment=pair(self.alignment),
            prompts=config.prompts,
            max_length=config.max_length,
        )

    @torch.no_grad()
    def load_adapter(self, adapter: Adapter) -> None:
        """Take over the tensors of an adapter of the same sizes."""
        pairs = ((self.reconstruction, adapter.reconstruction), (self.alignment, adapter.alignment))
        self.special.copy_(adapter.special)
        for layer, pair in pairs:
            assert pair is not None  # a checkpoint of ours has both
            layer.weight.copy_(pair[0])
            layer.bias.copy_(pair[1])


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """nn.Linear with its usual initialisation, drawn from `generator`."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # no draws of its own
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
