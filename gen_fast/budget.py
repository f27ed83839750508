"""How many tokens are run at once: enough to fill the device, few enough to fit its memory."""

import logging
import re

import torch

from gen_fast.backbone import Backbone

logger = logging.getLogger(__name__)

# On a CPU the activations of a batch should stay in the caches. SmolLM2-135M in
# bf16 on two Zen 4 cores (32 MB L3) took 4.65 s for 64 texts of 122 tokens at a budget of 2,048
# and 5.41 s at 8,192 (Encoder.encode, interleaved, medians of three).
CPU_TOKENS = 2048
# On a GPU the largest of these that fits in half of the free memory.
GPU_TOKENS = (65536, 32768, 16384, 8192, 4096, 2048)
SMALLEST = 64


class TokenBudget:
    """Tokens a batch. Starts from the device's memory and is halved when that does not suffice."""

    def __init__(self, backbone: Backbone) -> None:
        self.tokens = CPU_TOKENS
        if backbone.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(backbone.device)
            need = activation_bytes_per_token(backbone)
            fitting = [tokens for tokens in GPU_TOKENS if tokens * need <= free // 2]
            self.tokens = fitting[0] if fitting else GPU_TOKENS[-1]

    def shrink(self, error: RuntimeError, tokens: int, texts: int) -> None:
        """After a batch of `tokens` tokens failed: halve the budget if memory was the reason.

        Raises `error` again if it was not, or if the batch is a single text or already small.
        """
        if not is_out_of_memory(error) or texts == 1 or tokens <= SMALLEST:
            raise error
        self.tokens = max(SMALLEST, min(self.tokens, tokens) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory at %d tokens: going on with %d", tokens, self.tokens)


def activation_bytes_per_token(backbone: Backbone) -> int:
    """Upper estimate of the memory one token's activations take within a layer, in bytes."""
    config = backbone.config
    width = 4 * config.hidden_size + 3 * config.intermediate_size
    width += 2 * (config.q_size + 2 * config.kv_size)
    return width * backbone.embedding.element_size()


def is_out_of_memory(error: RuntimeError) -> bool:
    """True for CUDA's and for the CPU allocator's failure."""
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search(r"DefaultCPUAllocator|not enough memory|bad alloc", str(error))
    )
