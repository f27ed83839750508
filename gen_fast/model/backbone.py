"""The frozen decoder: RMSNorm, grouped-query attention, RoPE and SwiGLU over packed tokens.

One class for Llama, SmolLM2, Qwen2, Qwen2.5, Qwen3 and Mistral; they differ only in the fields of
BackboneConfig. Sizes: T rows, B texts, R needed rows, h hidden, H query heads, KV key/value
heads, D head size, f feed-forward size, P prefix length, V vocabulary, L layers.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.batch import PackedBatch
from gen_fast.model.config import BackboneConfig, inverse_frequencies
from gen_fast.model.kv_cache import KVCache
from gen_fast.model.linear import can_pack, linear, pack
from gen_fast.ops.append import append
from gen_fast.ops.attention import AttentionOptions, attention
from gen_fast.ops.norm import add_rms_norm, rms_norm
from gen_fast.ops.rope import rope
from gen_fast.ops.swiglu import swiglu


@dataclass(frozen=True)
class LayerWeights:
    """One block. Queries, keys and values share one matrix, and so do gate and up."""

    attention_norm: Tensor  # [h]
    qkv: Tensor  # [(H + 2·KV)·D, h]
    qkv_bias: Tensor | None  # [(H + 2·KV)·D]
    qk_norm: Tensor | None  # [H + KV, D], Qwen3's weight of each query and key head
    out: Tensor  # [h, H·D]
    mlp_norm: Tensor  # [h]
    gate_up: Tensor  # [2f, h]
    down: Tensor  # [h, f]

    def packed(self) -> "LayerWeights":
        """The same, laid out as its device multiplies it fastest, where that gains anything.

        For inference only: packed weights have no gradients, and no views of parts.
        """
        if not can_pack(self.qkv):
            return self
        names = ("qkv", "out", "gate_up", "down")
        return replace(self, **{name: pack(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class PrefixKV:
    """Keys (after RoPE) and values of a shared prefix, a [P, KV, D] pair a layer."""

    ids: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> "PrefixKV":
        """Return the first `length` tokens, as views: exact, because attention is causal."""
        if length == len(self):
            return self
        layers = tuple((k[:length], v[:length]) for k, v in self.layers)
        return PrefixKV(self.ids[:length], layers)

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, in bytes."""
        return sum(x.nbytes for pair in self.layers for x in pair)


class Backbone:
    """The decoder stack and its weights. It owns no gradient: weights are frozen.

    Built by `gen_fast.model.weights.load_backbone`. `fingerprint` tells one set of weights from
    another (see weights.py); adapters and caches are checked against it.
    """

    def __init__(
        self,
        config: BackboneConfig,
        embedding: Tensor,
        layers: tuple[LayerWeights, ...],
        final_norm: Tensor,
        fingerprint: Mapping[str, str | int | float],
    ) -> None:
        self.config = config
        self.embedding = embedding  # [V, h]
        self.layers = layers
        self.final_norm = final_norm  # [h]
        self.fingerprint = dict(fingerprint)
        self._inverse_frequencies = inverse_frequencies(config)
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._rotary_lock = threading.Lock()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.device

    @property
    def nbytes(self) -> int:
        """Memory of the weights, in bytes."""
        tensors = [t for layer in self.layers for t in vars(layer).values() if t is not None]
        return sum(t.nbytes for t in [self.embedding, self.final_norm, *tensors])

    @property
    def packed(self) -> bool:
        """Whether the weights are laid out for inference: see LayerWeights.packed."""
        return bool(self.layers[0].qkv.is_mkldnn)

    def forward(
        self,
        batch: PackedBatch,
        *,
        special: Tensor | None = None,
        prefix: PrefixKV | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the residual stream [R, h] at the needed rows, before the final norm.

        special [k, h]: embeddings of ids V, V + 1, … . prefix: keys and values before each text.
        cache: the texts' own tokens so far, if they were begun in an earlier pass; the batch's are
        added. `batch.positions` must count both. The last layer computes attention, its output
        and feed-forward for the needed rows only. Gradients reach `special`, nothing else.
        """
        stream, _ = self._run(batch, special, prefix, cache, keep_kv=False)
        return stream

    def new_cache(self, capacities: Sequence[int] | np.ndarray) -> KVCache:
        """An empty cache for texts of at most `capacities[i]` tokens each."""
        return KVCache(self.config, capacities, dtype=self.dtype, device=self.device)

    def prefill(self, ids: tuple[int, ...]) -> PrefixKV:
        """Run a prefix once and keep every layer's keys and values."""
        batch = PackedBatch.pack([np.array(ids, dtype=np.int64)], needed=[0], device=self.device)
        _, kv = self._run(batch, None, None, None, keep_kv=True)
        return PrefixKV(tuple(ids), tuple(kv))

    def _run(
        self,
        batch: PackedBatch,
        special: Tensor | None,
        prefix: PrefixKV | None,
        cache: KVCache | None,
        keep_kv: bool,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        config = self.config
        eps = config.norm_eps
        kept: list[tuple[Tensor, Tensor]] = []
        ids, positions, needed = batch.ids, batch.positions, batch.needed.indices
        n_tokens = len(ids)
        n_needed = n_tokens if needed is None else len(needed)
        if self.packed:
            ids, positions = with_padding_rows(ids), with_padding_rows(positions)
            needed = None if needed is None else with_padding_rows(needed)
        # T bounds the length of every text without asking the device for the maximum.
        longest = len(positions)
        cu_seqlens, cu_needed = batch.cu_seqlens, batch.needed.cu_seqlens
        cu_keys = cu_seqlens
        if cache is not None:
            place = cache.place(batch)
            cu_seqlens, cu_needed, cu_keys = place.cu_seqlens, place.cu_needed, place.cu_keys
            longest = int(cache.lengths.max(initial=0))
        longest += 0 if prefix is None else len(prefix)
        cos, sin = self._rotary_rows(positions, longest)

        stream = append(self.embedding, special, ids)  # [T, h]
        normed = rms_norm(stream, self.layers[0].attention_norm, eps)
        windows = config.windows
        options: AttentionOptions | None = None  # layers that can share them
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            q, k, v = self._qkv(layer, normed, cos, sin)
            if keep_kv:
                kept.append((k[:n_tokens].contiguous(), v[:n_tokens].contiguous()))
            if cache is not None:
                k, v = cache.extend(i, place.rows, k[:n_tokens], v[:n_tokens])
            if last and needed is not None:
                q, stream = q[needed], stream[needed]
                if not n_needed:
                    return stream, kept
            if last or options is None or options.window != windows[i]:
                cu_queries = cu_needed if last else cu_seqlens
                options = AttentionOptions(cu_queries, cu_keys, window=windows[i])
            if prefix is not None:
                options = options.with_prefix(*prefix.layers[i])
            mixed = attention(q, k, v, options)
            mixed = linear(mixed.flatten(1), layer.out)
            normed, stream = add_rms_norm(mixed, stream, layer.mlp_norm, eps, inplace=True)
            mixed = linear(swiglu(linear(normed, layer.gate_up)), layer.down)
            if last:
                return (stream + mixed)[:n_needed], kept
            following = self.layers[i + 1].attention_norm
            normed, stream = add_rms_norm(mixed, stream, following, eps, inplace=True)
        raise AssertionError("a backbone has at least one layer")

    def _qkv(
        self, layer: LayerWeights, normed: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [T, H, D] and k [T, KV, D], and v."""
        config = self.config
        n_q, n_kv = config.num_heads, config.num_kv_heads
        fused = linear(normed, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, config.head_dim))
        qk, v = fused.split([n_q + n_kv, n_kv], dim=1)
        if fused.requires_grad and layer.qk_norm is None:
            # Attention keeps v for its gradient: a view would keep q and k before the rotation too.
            v = v.contiguous()
        qk = rope(qk, cos, sin, layer.qk_norm, config.norm_eps, inplace=True)
        q, k = qk.split([n_q, n_kv], dim=1)
        return q, k, v

    def _rotary_rows(self, positions: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, D/2] of positions below `needed`, float32, from a growing table."""
        # Read once: another thread may put a larger one, or a smaller, in its place.
        table = self._rotary
        if table is None or len(table[0]) < needed:
            with self._rotary_lock:
                table = self._rotary
                if table is None or len(table[0]) < needed:
                    table = self._rotary = self._rotary_table(needed)
        cos, sin = table
        return cos[positions], sin[positions]

    def _rotary_table(self, needed: int) -> tuple[Tensor, Tensor]:
        size = 1 << max(needed - 1, 511).bit_length()
        dtype = torch.promote_types(self.dtype, torch.float32)
        angles = torch.arange(size, dtype=dtype).unsqueeze(1) * self._inverse_frequencies
        return angles.cos().to(self.device), angles.sin().to(self.device)


def with_padding_rows(values: Tensor) -> Tensor:
    """`values` [n] followed by zeros, `padded_rows(n)` in all.

    Padding rows belong to no text and attention leaves them at 0: oneDNN's products read over the
    end of a row, where a NaN would reach the last row of a text.
    """
    return torch.nn.functional.pad(values, (0, padded_rows(len(values)) - len(values)))


def padded_rows(rows: int) -> int:
    """The next of 32 evenly spaced numbers in each power of two: at most 1/32 more rows.

    oneDNN prepares, and keeps, each product once for every number of rows that it meets: with
    padding rows it meets few.
    """
    step = 1 << max(0, rows.bit_length() - 6)
    return -(-rows // step) * step
