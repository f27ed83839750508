"""How many tokens are run at once: enough to fill the device, few enough to fit its memory."""

import logging
import re
from collections.abc import Sequence

import torch

from gen_fast.model.backbone import Backbone
from gen_fast.model.memory import free_memory

logger = logging.getLogger(__name__)

# On a CPU the activations of a batch should stay in the caches. SmolLM2-135M in
# bf16 on two Zen 4 cores (32 MB L3) took 4.65 s for 64 texts of 122 tokens at a budget of 2,048
# and 5.41 s at 8,192 (Encoder.encode, interleaved, medians of three).
CPU_TOKENS = 2048
# On a GPU the largest of these that fits in half of the free memory.
GPU_TOKENS = (65536, 32768, 16384, 8192, 4096, 2048)
SMALLEST = 64


class TokenBudget:
    """Tokens a batch. Starts from the device's memory and is halved when that does not suffice.

    cpu_tokens: the start on a CPU. gpu_tokens: starts to choose from on a GPU, largest first, of
    which each token takes bytes_per_token (by default what a forward pass needs). reserved: bytes
    of what is free that something else will take.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        cpu_tokens: int = CPU_TOKENS,
        gpu_tokens: Sequence[int] = GPU_TOKENS,
        bytes_per_token: int | None = None,
        reserved: int = 0,
    ) -> None:
        self.tokens = cpu_tokens
        self._shrunk = False
        if backbone.device.type == "cuda":
            free = free_memory(backbone.device) - reserved
            need = bytes_per_token or activation_bytes_per_token(backbone)
            fitting = [tokens for tokens in gpu_tokens if tokens * need <= free // 2]
            self.tokens = fitting[0] if fitting else gpu_tokens[-1]

    def limit(self, asked: int | None) -> int:
        """Tokens a batch where the caller has `asked` for a number: no more than has fitted."""
        if asked is None:
            return self.tokens
        return min(asked, self.tokens) if self._shrunk else asked

    def shrink(self, error: RuntimeError, tokens: int, texts: int) -> None:
        """After a batch of `tokens` tokens failed: halve the budget if memory was the reason.

        Raises `error` again if it was not, or if the batch is a single text or already small.
        """
        if not is_out_of_memory(error) or texts == 1 or tokens <= SMALLEST:
            raise error
        self.tokens = max(SMALLEST, (min(self.tokens, tokens) if self._shrunk else tokens) // 2)
        self._shrunk = True
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory at %d tokens: going on with %d", tokens, self.tokens)


def activation_bytes_per_token(backbone: Backbone) -> int:
    """Upper estimate of the memory one token's activations take within a layer, in bytes."""
    config = backbone.config
    width = 4 * config.hidden_size + 3 * config.intermediate_size
    width += 2 * (config.q_size + 2 * config.kv_size)
    return width * backbone.embedding.element_size()


def saved_bytes_per_token(backbone: Backbone) -> int:
    """What one token's activations take while a backward pass is waited for, in bytes.

    A layer saves the stream twice, q, k, v, attention's output, gate and up.
    """
    config = backbone.config
    width = 2 * config.hidden_size + 2 * config.intermediate_size
    width += 2 * (config.q_size + config.kv_size)
    return config.num_layers * width * backbone.embedding.element_size()


# Not every library's failure to allocate is a torch.OutOfMemoryError: a handle of cuBLAS or cuDNN,
# a kernel that Triton loads or launches, the CUDA context, and the CPU's allocators.
_OUT_OF_MEMORY = re.compile(
    r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|CUDA error: out of memory"
    r"|Triton Error \[CUDA\]: out of memory|DefaultCPUAllocator|not enough memory|bad alloc"
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """True if an allocation has failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))
