"""What shapes a backbone's computation, whatever its weights; read from a config.json.

A closed list of families is read. A config key that changes the computation and is not supported
is an error that names it. So is code of the model's own (`auto_map`): it is never run, and without
it the numbers would be others. Only a model that is meant to attend to later tokens may name the
classes by which LLM2Vec does so, because the backbone computes the same.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import UnsupportedModelError
from gen_fast.model.config_values import flag, integer, names, positive, table

# In the quantization_config of copies that are quantised here: see quantized.py.
QUANT_METHOD = "gen_fast"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# More than any model has; a number that only damage makes would be counted up to.
_MOST_LAYERS = 10_000
# Classes that a model's own code may replace so that the numbers are others.
_OWN_CODE = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
# LLM2Vec's classes, published (…EncoderModel) and of its package: the family's own, without the
# causal mask. Source: llm2vec 0.2.3, models/.
LLM2VEC_CLASSES = frozenset(
    f"{family}{kind}"
    for family in ("Llama", "Mistral", "Qwen2")
    for kind in ("EncoderModel", "BiModel", "BiForMNTP")
)
# Keys by which models of these families ask for attention to later tokens, and what they then say.
_BIDIRECTIONAL = {
    "is_causal": False,
    "use_bidirectional_attention": True,
    "use_bidirectional": True,
    "bidirectional_attention": True,
    "bidirectional": True,
}


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


def parse_config(raw: Mapping[str, Any], *, bidirectional: bool = False) -> BackboneConfig:
    """Translate a Hugging Face config.json. Raises UnsupportedModelError naming the key.

    bidirectional: the model will be run without the causal mask, so it may ask for that.
    """
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {family!r} is not supported; families: {', '.join(FAMILIES)}"
        )
    num_heads = integer(raw, "num_attention_heads")
    hidden_size = integer(raw, "hidden_size")
    num_layers = integer(raw, "num_hidden_layers", most=_MOST_LAYERS)
    theta, scaling = _rope_parameters(raw)
    config = BackboneConfig(
        family=family,
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=integer(raw, "num_key_value_heads", num_heads),
        head_dim=integer(raw, "head_dim", hidden_size // num_heads),
        norm_eps=positive(raw, "rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2" or flag(raw, "attention_bias"),
        qk_norm=family == "qwen3",
        tied_head=flag(raw, "tie_word_embeddings"),
        max_positions=integer(raw, "max_position_embeddings"),
        windows=_windows(raw, family, num_layers),
    )
    _check_supported(raw, config, bidirectional)
    return config


def class_names(raw: Mapping[str, Any]) -> set[str]:
    """The classes that a config.json names, its own code's without their modules.

    Raises UnsupportedModelError.
    """
    code = table(raw, "auto_map").values()
    return {*(str(value).split(".")[-1] for value in code), *names(raw, "architectures")}


def _check_supported(raw: Mapping[str, Any], config: BackboneConfig, bidirectional: bool) -> None:
    allowed = LLM2VEC_CLASSES if bidirectional else frozenset()
    code = table(raw, "auto_map")
    own_code = [
        key for key in _OWN_CODE if key in code and str(code[key]).split(".")[-1] not in allowed
    ]
    if own_code:
        raise UnsupportedModelError(
            f"auto_map names code of the model's own for {', '.join(own_code)}; it is never run, "
            "and without it the embeddings would be others"
        )
    for key, value in _BIDIRECTIONAL.items():
        # Gemma spells the flag "all": anything but the causal value asks for later tokens.
        if raw.get(key) is not None and bool(raw[key]) == value and not bidirectional:
            raise UnsupportedModelError(
                f"{key} {raw[key]!r} asks for attention to later tokens, which only method "
                "'llm2vec' computes"
            )
    known = {f"{config.family}{head}" for head in ("model", "forcausallm")}
    unknown = [
        name
        for name in names(raw, "architectures")
        if name.lower() not in known and name not in allowed
    ]
    if unknown:
        raise UnsupportedModelError(
            f"architectures {', '.join(unknown)}: not a plain {config.family} model"
        )
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"hidden_act {activation!r} is not supported, only 'silu'")
    if flag(raw, "mlp_bias"):
        raise UnsupportedModelError("mlp_bias is not supported")
    quantization = table(raw, "quantization_config")
    method = quantization and quantization.get("quant_method")
    if quantization and method != QUANT_METHOD:
        raise UnsupportedModelError(
            f"quantization_config with quant_method {method!r} is not supported in safetensors; "
            "use the unquantised model or a GGUF file"
        )
    if config.head_dim % 2:
        raise UnsupportedModelError(f"head_dim {config.head_dim} is not even")
    if config.num_heads % config.num_kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads {config.num_heads} is not a multiple of "
            f"num_key_value_heads {config.num_kv_heads}"
        )


def _rope_parameters(raw: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """Read both spellings: rope_theta + rope_scaling, and transformers 5's rope_parameters."""
    rope = table(raw, "rope_parameters") or table(raw, "rope_scaling")
    theta = positive(rope, "rope_theta", positive(raw, "rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = positive(raw, "partial_rotary_factor", 1.0)
    if positive(rope, "partial_rotary_factor", partial) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModelError(f"rope_type {kind!r} is not supported: 'default' or 'llama3'")
    scaling = Llama3Scaling(
        factor=positive(rope, "factor"),
        low_freq_factor=positive(rope, "low_freq_factor"),
        high_freq_factor=positive(rope, "high_freq_factor"),
        original_max_positions=integer(rope, "original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UnsupportedModelError(
            f"low_freq_factor {scaling.low_freq_factor} is not below high_freq_factor "
            f"{scaling.high_freq_factor}"
        )
    return theta, scaling


def _windows(raw: Mapping[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    window = None if raw.get("sliding_window") is None else integer(raw, "sliding_window")
    if raw.get("layer_types") is not None:
        kinds = names(raw, "layer_types")
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != num_layers:
            raise UnsupportedModelError(f"layer_types {sorted(set(kinds))} is not supported")
        if window is None and "sliding_attention" in kinds:
            raise UnsupportedModelError("layer_types has sliding_attention without sliding_window")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if window is None or not flag(raw, "use_sliding_window", family == "mistral"):
        return (None,) * num_layers
    # Qwen keeps full attention in its first max_window_layers layers; Mistral has no such key.
    full = integer(raw, "max_window_layers", 0, least=0) if family != "mistral" else 0
    return tuple(None if i < full else window for i in range(num_layers))
