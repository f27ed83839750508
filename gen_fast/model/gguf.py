"""GGUF files: settings and tensors in Hugging Face's names and layout, one tensor at a time.

Names and layout by llama.cpp's convert_hf_to_gguf.py, keys by its GGUF specification.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from torch import Tensor

from gen_fast.errors import UnsupportedModelError, WeightsError

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FILE_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Settings of an architecture that are read, or change nothing that is computed.
_KNOWN_SETTINGS = frozenset(
    (
        "attention.causal",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_used_count",
        "feed_forward_length",
        "pooling_type",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "vocab_size",
    )
)
# numpy has no bfloat16.
_STORED_DTYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


class _Reader(GGUFReader):  # type: ignore[misc]  # untyped
    """The package's own, but that values are slices of a plain array.

    Each slice of np.memmap makes a memmap in Python, and a vocabulary is some hundred thousand.
    """

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)


class GGUFFile:
    """A model in one GGUF file, mapped; nothing of its tensors is read before it is asked for.

    Raises WeightsError for what is no GGUF file, UnsupportedModelError for what the backbone does
    not compute.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._reader = _Reader(self.path)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise WeightsError(f"{path} is not a GGUF file, or damaged: {error}") from error
        if self._value("split.count", 1) != 1:
            raise UnsupportedModelError(f"{path} is one of several files: merge them first")
        self.architecture = str(self._value("general.architecture", "missing"))
        if self.architecture not in _ARCHITECTURES:
            raise UnsupportedModelError(
                f"{path}: architecture {self.architecture!r} is not supported; GGUF "
                f"architectures: {', '.join(_ARCHITECTURES)}"
            )
        self._tensors = {
            self._name(tensor.name): tensor
            for tensor in self._reader.tensors
            if tensor.name != _ROPE_FACTORS
        }

    def names(self) -> Iterator[str]:
        """Names of the tensors, as in a state dict of transformers."""
        return iter(self._tensors)

    def nbytes(self, name: str) -> int:
        """Memory of what `tensor` returns, in bytes."""
        stored = self._tensors[name]
        dtype = _STORED_DTYPES.get(stored.tensor_type, torch.float32)
        return int(stored.n_elements) * dtype.itemsize

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor: quantised blocks as float32, anything else in the stored dtype.

        Raises WeightsError for a damaged one, UnsupportedModelError.
        """
        try:
            return self._tensor(name)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise WeightsError(f"{self.path}: tensor {name!r} is damaged: {error}") from error

    def _tensor(self, name: str) -> Tensor:
        stored = self._tensors[name]
        dtype = _STORED_DTYPES.get(stored.tensor_type)
        shape = tuple(int(size) for size in reversed(stored.shape))
        if dtype is None:
            try:
                values = dequantize(stored.data, stored.tensor_type)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{self.path}: {stored.name} is quantised as {stored.tensor_type.name}, which "
                    "the gguf package does not read"
                ) from error
            tensor = torch.from_numpy(values)
        else:
            tensor = torch.from_numpy(np.array(stored.data).view(np.uint8)).view(dtype)
        tensor = tensor.reshape(shape)
        if self.architecture == "llama":
            heads, kv_heads = self._heads()
            count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
            if count is not None:
                tensor = _halves_together(tensor, count)
        return tensor

    def config(self) -> dict[str, Any]:
        """The content of the config.json of the same model."""
        heads, kv_heads = self._heads()
        if "model.embed_tokens.weight" not in self._tensors:
            raise WeightsError(f"{self.path} has no token embeddings")
        hidden = self._count("embedding_length")
        head_dim = self._count("attention.key_length", hidden // heads)
        window = self._count("attention.sliding_window", 0)
        self._refuse_settings(head_dim)
        config = {
            # Llama with a sliding window is Mistral, which has no architecture of its own here.
            "model_type": "mistral" if window and self.architecture == "llama" else None,
            "vocab_size": int(self._tensors["model.embed_tokens.weight"].shape[1]),
            "hidden_size": hidden,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(head_dim),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "sliding_window": window or None,
            "use_sliding_window": bool(window),
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self._value("tokenizer.ggml.eos_token_id", None),
            "pad_token_id": self._value("tokenizer.ggml.padding_token_id", None),
        }
        config["model_type"] = config["model_type"] or self.architecture
        return config

    def _heads(self) -> tuple[int, int]:
        """Query heads, and key and value heads, of every layer."""
        heads = self._setting("attention.head_count")
        kv_heads = self._setting("attention.head_count_kv", heads)
        if isinstance(heads, list) or isinstance(kv_heads, list):
            raise UnsupportedModelError(f"{self.path}: layers of different numbers of heads")
        heads = self._count("attention.head_count")
        return heads, self._count("attention.head_count_kv", heads)

    def _refuse_settings(self, head_dim: int) -> None:
        """Raise UnsupportedModelError for settings that the backbone does not compute."""
        prefix = f"{self.architecture}."
        for field in self._reader.fields:
            if field.startswith(prefix) and field.removeprefix(prefix) not in _KNOWN_SETTINGS:
                raise UnsupportedModelError(f"{self.path}: {field} is not supported")
        unsupported = {
            "attention.causal": (True, "attention that is not causal"),
            "expert_count": (0, "experts"),
            "rope.scaling.type": ("none", "scaled rotary embedding"),
            "rope.dimension_count": (head_dim, "a rotary embedding of a part of a head"),
            "attention.value_length": (head_dim, "values of another size than keys"),
            "pooling_type": (0, "an embedding model's pooling: use its safetensors files"),
        }
        for key, (supported, meaning) in unsupported.items():
            value = self._setting(key, supported)
            if value != supported:
                raise UnsupportedModelError(
                    f"{self.path}: {self.architecture}.{key} is {value!r}: {meaning} is not "
                    "supported"
                )

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """rope_parameters of a config.json. Llama 3's scaling lies in the file as its factors."""
        theta = self._number("rope.freq_base", 10_000.0)
        factors = [t for t in self._reader.tensors if t.name == _ROPE_FACTORS]
        if not factors:
            return {"rope_type": "default", "rope_theta": theta}
        stored = torch.from_numpy(np.array(factors[0].data, dtype=np.float32))
        scaling = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": float(stored.max()),
            # The released models' values; a file does not have them, but what follows from them.
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        if not torch.allclose(_llama3_factors(scaling, head_dim), stored, rtol=1e-3):
            raise UnsupportedModelError(
                f"{self.path}: {_ROPE_FACTORS} are not those of Llama 3's scaling"
            )
        return scaling

    def _count(self, key: str, *default: int) -> int:
        """A setting that is a whole number above 0, or the default."""
        value = self._setting(key, *default)
        if not isinstance(value, int) or (value < 1 and (value,) != default):
            raise WeightsError(f"{self.path}: {key} is {value!r:.60}, not a whole number above 0")
        return value

    def _number(self, key: str, *default: float) -> float:
        """A setting that is a finite number."""
        value = self._setting(key, *default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise WeightsError(f"{self.path}: {key} is {value!r:.60}, not a finite number")
        return float(value)

    def _setting(self, key: str, *default: Any) -> Any:
        """A setting of the architecture."""
        return self._value(f"{self.architecture}.{key}", *default)

    def _value(self, key: str, *default: Any) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            try:
                return field.contents()
            except (ValueError, IndexError, TypeError) as error:
                raise WeightsError(f"{self.path}: the key {key!r} is damaged: {error}") from error
        if default:
            return default[0]
        raise WeightsError(f"{self.path} lacks the key {key!r}")

    def _name(self, name: str) -> str:
        """A tensor's name in transformers. Raises UnsupportedModelError."""
        module, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
        if layer is not None and layer[2] in _LAYER_NAMES:
            return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
        if module in _FILE_NAMES:
            return f"{_FILE_NAMES[module]}.{kind}"
        raise UnsupportedModelError(f"{self.path}: tensor {name!r} is not supported")


def _halves_together(interleaved: Tensor, heads: int) -> Tensor:
    """Rows of q or k, [H·D, …], with each head's two halves one after the other.

    GGUF's llama has rows 2i and 2i + 1 of a head turned together, transformers i and i + D/2.
    """
    halves: Tensor = interleaved.unflatten(0, (heads, -1, 2)).transpose(1, 2)
    return halves.flatten(0, 2).contiguous()


def _llama3_factors(scaling: dict[str, Any], head_dim: int) -> Tensor:
    """What GGUF divides each rotary frequency by, [D/2] float32.

    Source: Llama 3 herd, arXiv 2407.21783, and convert_hf_to_gguf.py, which stores them.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    turns = scaling["original_max_position_embeddings"] / (2 * torch.pi)
    turns = turns * scaling["rope_theta"] ** -exponents
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    factors: Tensor = 1.0 / (keep + (1 - keep) / scaling["factor"])
    return factors
