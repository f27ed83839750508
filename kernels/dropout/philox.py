"""Philox4x32-10, the counter-based generator behind dropout, in plain torch.

A number is a function of a key and a counter, with no state in between: what is dropped of an
element follows from where it stands, and is the same in the forward pass, in the backward pass
and when a text is run again in another batch.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, §3.3 and table 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gen_fast.errors import OpError

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
_WORD = 0xFFFFFFFF

# c2 of the counters tells what is dropped: layer · HEADS + head for attention, which has fewer than
# LAYERS layers, and ROWS + stream for rows.
HEADS, LAYERS, ROWS = 1 << 16, 1 << 15, 1 << 31


def philox(seed: int, counter: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Four words of 32 bits for each counter.

    seed: the key, its low word first, in [0, 2^64). counter: c0, c1, c2, c3, int64 tensors that
    broadcast, of whose values the low 32 bits count. Returns four int64 tensors in [0, 2^32).
    """
    c0, c1, c2, c3 = (word & _WORD for word in torch.broadcast_tensors(*counter))
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # modulo 2^64, which is enough
        c0, c1 = (second >> 32 & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = (first >> 32 & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return c0, c1, c2, c3


def kept(seed: int, p: float, columns: int, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """Which of `columns` elements beside each other are not dropped; bool [..., columns].

    Column j takes word j % 4 of counter (j // 4, c1, c2, c3). c1, c2, c3: int64 tensors that
    broadcast to the shape before the columns.
    """
    c0 = torch.arange(-(-columns // 4), device=c1.device)
    words = philox(seed, (c0, c1.unsqueeze(-1), c2.unsqueeze(-1), c3.unsqueeze(-1)))
    return torch.stack(words, -1).flatten(-2)[..., :columns] >= threshold(p)


def threshold(p: float) -> int:
    """The first word that is kept where a share `p` is dropped: p · 2^32, rounded."""
    return min(round(p * 2**32), _WORD)


def check_dropout(p: float, seed: int, text_keys: Tensor | None) -> None:
    """Raise OpError for what the generator does not take."""
    if not 0 <= p < 1:
        raise OpError(f"dropout is a share of at least 0 and below 1, not {p}")
    if not 0 <= seed < 2**63:
        raise OpError(f"a seed of dropout is in [0, 2^63), not {seed}")
    if text_keys is not None and text_keys.dtype not in (torch.int32, torch.int64):
        raise OpError(f"text_keys must be int32 or int64, not {text_keys.dtype}")


def words_of(text_keys: Tensor) -> Tensor:
    """The low 32 bits of each key, contiguous int32, as the kernels read them."""
    return text_keys.to(torch.int32).contiguous()
