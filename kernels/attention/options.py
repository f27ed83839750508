"""What attention is computed over, beside q, k and v."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import OpError
from gen_fast.ops import native
from gen_fast.ops.dropout.philox import LAYERS, check_dropout, threshold, words_of
from gen_fast.ops.layout import dense_rows

MASKS = ("causal", "bidirectional", "gem")
_MASK_NUMBERS = {mask: number for number, mask in enumerate(MASKS)}  # csrc/cpu/ops.h


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """Where each text lies in the packed rows, its prefix, its mask and its dropout.

    B texts, P prefix tokens, KV key/value heads, D head size. Layers that share all of this should
    share the object: it is checked, and prepared for C++, once. Its tensors must not be
    changed: C++ may keep copies of them.
    Raises OpError for shapes and dtypes that do not fit, for a mask that does not exist or cannot
    be combined, and for dropout with a prefix. What cu_seqlens and blocks hold is not looked at: on
    a GPU that would stop the host.
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
    dropout: float = 0.0
    """Share of the weights that are dropped after the softmax, the others scaled by
    1 / (1 - dropout); not with a prefix, which is frozen and computed without."""
    seed: int = 0
    """In [0, 2^63), for dropout. A weight is dropped or not for its seed, layer, head, text key and
    own positions of query and key alone."""
    layer: int = 0
    """Below 32,768: layers with one seed drop different weights."""
    text_keys: Tensor | None = None
    """[B] int32 or int64, of which the low 32 bits count: a number of each text, the same wherever
    the same is to be dropped; by default its place in the batch."""

    def __post_init__(self) -> None:
        self.__dict__["_batch"] = {}
        _check_cu_seqlens(self.cu_seqlens_q, self.cu_seqlens_q.numel())
        if self.cu_seqlens_k is not self.cu_seqlens_q:
            _check_cu_seqlens(self.cu_seqlens_k, self.cu_seqlens_q.numel())
        if self.prefix_k is not None or self.prefix_v is not None:
            self._check_prefix()
        if self.window is not None and self.window < 1:
            raise OpError(f"a sliding window is at least 1 token, not {self.window}")
        if self.mask != "causal" or self.blocks is not None:
            self._check_mask()
        if self.dropout:
            self._check_dropout()

    def _check_prefix(self) -> None:
        k, v = self.prefix_k, self.prefix_v
        if k is None or v is None or k.shape != v.shape or k.dtype != v.dtype:
            raise OpError("a prefix has as many keys as values, of one dtype")
        if self.dropout:
            raise OpError(
                "dropout does not go with a prefix, which is frozen and computed without it: give"
                " every text all of its tokens, or set dropout to 0"
            )

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

    def _check_dropout(self) -> None:
        check_dropout(self.dropout, self.seed, self.text_keys)
        if self.text_keys is not None and self.text_keys.shape != (self.texts,):
            raise OpError(f"text_keys must be [{self.texts}], not {list(self.text_keys.shape)}")
        self._check_layer()

    def _check_layer(self) -> None:
        if not 0 <= self.layer < LAYERS:
            raise OpError(f"a layer is in [0, {LAYERS}), not {self.layer}")

    def with_prefix(self, k: Tensor, v: Tensor) -> "AttentionOptions":
        """The same of another layer, whose keys and values of the prefix are k and v.

        Only these are checked: a batch takes a new object a layer, and the rest has been looked at.
        """
        other = self._with(prefix_k=k, prefix_v=v)
        other._check_prefix()
        return other

    def without_prefix(self) -> "AttentionOptions":
        """The same of the texts' own keys alone."""
        return self._with(prefix_k=None, prefix_v=None)

    def with_layer(self, layer: int) -> "AttentionOptions":
        """The same for another layer, whose dropout is its own. Without dropout, `self`."""
        if not self.dropout:
            return self
        other = self._with(layer=layer)
        other._check_layer()
        return other

    def _with(self, **fields: Any) -> "AttentionOptions":
        other = object.__new__(AttentionOptions)
        other.__dict__.update(self.__dict__, **fields)
        other.__dict__.pop("_cpp", None)
        return other

    @property
    def batch(self) -> dict[Hashable, Any]:
        """What is made once for all layers of a batch, by name, see `once_a_batch`."""
        batch: dict[Hashable, Any] = self.__dict__["_batch"]
        return batch

    def once_a_batch(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What `make()` gives, the first time; it may read nothing but lengths and text keys.

        Options that `with_prefix` and `with_layer` give keep it together.
        """
        batch = self.batch
        if name not in batch:
            batch[name] = make()
        return batch[name]

    def with_batch(self, batch: dict[Hashable, Any]) -> "AttentionOptions":
        """The same, keeping together with `batch`, of other options of the same texts."""
        return self._with(_batch=batch)

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
    def text_words(self) -> Tensor | None:
        """The text keys as the kernels read them, [B] int32; None without dropout."""
        if not self.dropout:
            return None

        def make() -> Tensor:
            device, keys = self.cu_seqlens_q.device, self.text_keys
            return words_of(torch.arange(self.texts, device=device) if keys is None else keys)

        words: Tensor = self.once_a_batch("text words", make)
        return words

    @property
    def first_kept(self) -> int:
        """Weights are kept whose word of 32 bits is not below this."""
        return threshold(self.dropout)

    @property
    def kept_scale(self) -> float:
        """What the weights that are kept are multiplied by."""
        return 1 / (1 - self.dropout)

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
        text_words = self.text_words
        struct = native.module().AttentionOptions(
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            prefix_k,
            prefix_v,
            blocks,
            text_words,
            self.texts,
            0 if prefix_k is None else prefix_k.size(0),
            0 if prefix_k is None else prefix_k.stride(0),
            0 if prefix_v is None else prefix_v.stride(0),
            self.window or 0,
            _MASK_NUMBERS[self.mask],
            self.seed,
            self.layer,
            self.first_kept,
            self.kept_scale,
        )
        return struct, prefix_k, prefix_v, blocks, text_words


def _check_cu_seqlens(cu_seqlens: Tensor, count: int) -> None:
    if cu_seqlens.dtype != torch.int32 or not cu_seqlens.is_contiguous():
        raise OpError(f"cu_seqlens must be contiguous and int32, not {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() != count or not count:
        raise OpError("cu_seqlens must be equally many, one more than there are texts")
