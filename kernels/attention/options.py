"""What attention is computed over, beside q, k and v."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import native
from gen_fast.ops.layout import dense_rows

MASKS = ("causal", "bidirectional", "gem")
_MASK_NUMBERS = {mask: number for number, mask in enumerate(MASKS)}  # csrc/cpu/ops.h


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """Where each text lies in the packed rows, its prefix and its mask.

    B texts, P prefix tokens, KV key/value heads, D head size. Layers that share all of this should
    share the object: it is checked, and prepared for C++, once. Its tensors must not be
    changed: C++ may keep copies of them.
    Raises OpError for shapes and dtypes that do not fit, and for a mask that does not exist or
    cannot be combined. What cu_seqlens and blocks hold is not looked at: on a GPU that would stop
    the host.
    """

    cu_seqlens_q: Tensor
    """[B + 1] int32: rows cu_seqlens_q[i]:cu_seqlens_q[i + 1] of q belong to text i."""
    cu_seqlens_k: Tensor
    """[B + 1] int32: the same for k and v. A text may have fewer queries than keys."""
    prefix_k: Tensor | None = None
    """[P, KV, D] in the dtype of k: keys that stand before every text; frozen, no gradient."""
    prefix_v: Tensor | None = None
    """[P, KV, D] in the dtype of v: their values; frozen, no gradient."""
    window: int | None = None
    """Sliding window in tokens, counting the query itself; None for full attention."""
    mask: str = "causal"
    """"causal"; "bidirectional", every key of prefix and text (LLM2Vec); or "gem", causal except
    for what `blocks` says."""
    blocks: Tensor | None = None
    """[B, 2] int32, with the gem mask only: blocks[i] = (first, after) marks special tokens at own
    positions first … after - 1. They do not see each other, and tokens after them see neither the
    prefix nor the text before them."""

    def __post_init__(self) -> None:
        _check_cu_seqlens(self.cu_seqlens_q, self.cu_seqlens_q.numel())
        if self.cu_seqlens_k is not self.cu_seqlens_q:
            _check_cu_seqlens(self.cu_seqlens_k, self.cu_seqlens_q.numel())
        if self.prefix_k is not None or self.prefix_v is not None:
            self._check_prefix()
        if self.window is not None and self.window < 1:
            raise OpError(f"a sliding window is at least 1 token, not {self.window}")
        if self.mask != "causal" or self.blocks is not None:
            self._check_mask()

    def _check_prefix(self) -> None:
        k, v = self.prefix_k, self.prefix_v
        if k is None or v is None or k.shape != v.shape or k.dtype != v.dtype:
            raise OpError("a prefix has as many keys as values, of one dtype")

    def _check_mask(self) -> None:
        if self.mask not in MASKS:
            raise OpError(f"mask must be one of {', '.join(MASKS)}, not {self.mask!r}")
        if self.window is not None and self.mask == "bidirectional":
            raise OpError("a sliding window has no meaning in a bidirectional mask")
        if (self.blocks is None) == (self.mask == "gem"):
            raise OpError("`blocks` goes with the gem mask, and only with it")
        shape = (self.texts, 2)
        if self.blocks is not None and (
            self.blocks.shape != shape or self.blocks.dtype != torch.int32
        ):
            raise OpError(f"blocks must be {list(shape)} of int32, not {list(self.blocks.shape)}")

    def with_prefix(self, k: Tensor, v: Tensor) -> "AttentionOptions":
        """The same of another layer, whose keys and values of the prefix are k and v.

        Only these are checked: a batch takes a new object a layer, and the rest has been looked at.
        """
        other = object.__new__(AttentionOptions)
        other.__dict__.update(self.__dict__, prefix_k=k, prefix_v=v)
        other.__dict__.pop("_cpp", None)
        other._check_prefix()
        return other

    @property
    def texts(self) -> int:
        """B."""
        return self.cu_seqlens_q.size(0) - 1

    @property
    def prefix(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the prefix, each row's KV·D elements side by side; None if none."""
        if self.prefix_k is None or self.prefix_v is None:
            return None
        return dense_rows(self.prefix_k), dense_rows(self.prefix_v)

    @property
    def cpp(self) -> tuple[Any, ...]:
        """The struct that C++ takes, and after it the tensors that it points into."""
        kept: tuple[Any, ...] | None = self.__dict__.get("_cpp")
        if kept is None:
            kept = self.__dict__["_cpp"] = self._build_cpp()  # cached_property locks: 1 µs
        return kept

    def _build_cpp(self) -> tuple[Any, ...]:
        prefix_k, prefix_v = self.prefix or (None, None)
        blocks = None if self.blocks is None else self.blocks.contiguous()
        struct = native.module().AttentionOptions(
            self.cu_seqlens_q.data_ptr(),
            self.cu_seqlens_k.data_ptr(),
            self.texts,
            0 if prefix_k is None else prefix_k.data_ptr(),
            0 if prefix_v is None else prefix_v.data_ptr(),
            0 if prefix_k is None else prefix_k.size(0),
            0 if prefix_k is None else prefix_k.stride(0),
            0 if prefix_v is None else prefix_v.stride(0),
            self.window or 0,
            _MASK_NUMBERS[self.mask],
            0 if blocks is None else blocks.data_ptr(),
        )
        return struct, prefix_k, prefix_v, blocks


def _check_cu_seqlens(cu_seqlens: Tensor, count: int) -> None:
    if cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_contiguous():
        raise OpError(f"cu_seqlens must be contiguous and int32, not {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() != count or not count:
        raise OpError("cu_seqlens must be equally many, one more than there are texts")
