"""How much memory a model's weights take, and how much a GPU has left."""

import math

import torch

from gen_fast.errors import DeviceMemoryError
from gen_fast.model.choices import FP8, GROUP_BITS, INT8
from gen_fast.model.config import BackboneConfig
from gen_fast.ops.qlinear import group_blocks_shape

_SCALES = "float32 scales"


def free_memory(device: torch.device) -> int:
    """Bytes that torch can still allocate on a GPU: what is free, and what it keeps for reuse."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + int(kept)


def weight_bytes(
    config: BackboneConfig, dtype: torch.dtype, quantize: str | None = None
) -> dict[str, int]:
    """Bytes of a backbone's weights without a head of its own, by what they are stored as.

    quantize: one of QUANTIZED, for the matrices of the layers.
    """
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    qkv = config.q_size + 2 * config.kv_size
    matrices = [(qkv, h), (h, config.q_size), (2 * f, h), (h, f)]
    vectors = 2 * h + config.qkv_bias * qkv
    if config.qk_norm:
        vectors += (config.num_heads + config.num_kv_heads) * d
    others = (config.vocab_size + 1) * h + config.num_layers * vectors
    plain = str(dtype).removeprefix("torch.")
    found = {plain: others * dtype.itemsize}
    if quantize is None:
        found[plain] += config.num_layers * sum(map(math.prod, matrices)) * dtype.itemsize
    elif quantize in GROUP_BITS:
        blocks = [group_blocks_shape(x, GROUP_BITS[quantize]) for x in matrices]
        found[quantize] = config.num_layers * sum(map(math.prod, blocks))
    elif quantize in (INT8, FP8):
        found[quantize] = config.num_layers * sum(map(math.prod, matrices))
        found[_SCALES] = config.num_layers * sum(4 * outputs for outputs, _ in matrices)
    return found


def check_memory(weights: dict[str, int], device: torch.device | str, name: str) -> None:
    """Raise DeviceMemoryError if `weights`, bytes by what they are, exceed a GPU's free memory.

    Nothing on a CPU, whose system may take the memory from elsewhere. name: of what is loaded.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return
    needed, free = sum(weights.values()), free_memory(device)
    if needed > free:
        _, total = torch.cuda.mem_get_info(device)
        parts = ", ".join(f"{_gb(size)} {kind}" for kind, size in weights.items())
        raise DeviceMemoryError(
            f"{name} takes {_gb(needed)} ({parts}), and of the {_gb(total)} of {device}"
            f" {_gb(free)} are free: free some, take a smaller dtype, quantize= or a larger GPU; a"
            " model is never spread over several"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
