"""What shapes a backbone's computation, whatever its weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency scaling for long context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class BackboneConfig:
    """Everything that shapes the computation. `family` is the Hugging Face model_type."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    qkv_bias: bool
    qk_norm: bool
    tied_head: bool
    max_positions: int
    windows: tuple[int | None, ...]  # sliding window of each layer

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def non_embedding_parameters(self) -> int:
        """Weights multiplied with each token: the P of 2·P FLOPs a token."""
        attention_weights = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        return self.num_layers * (attention_weights + 3 * self.hidden_size * self.intermediate_size)


def inverse_frequencies(config: BackboneConfig) -> Tensor:
    """RoPE angle a position, [D/2] float32, with Llama 3.1's scaling where configured.

    Source: Llama 3 herd, arXiv 2407.21783, §3.4.2, and the released `rope_scaling` values: long
    wavelengths are divided by `factor`, short ones kept, those between blended linearly.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)
