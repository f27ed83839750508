"""The frozen decoder: RMSNorm, grouped-query attention, RoPE and SwiGLU over packed tokens.

One class for Llama, SmolLM2, Qwen2, Qwen2.5, Qwen3 and Mistral; they differ only in the fields of
BackboneConfig. Sizes: T rows, B texts, R needed rows, h hidden, H query heads, KV key/value
heads, D head size, f feed-forward size, P prefix length, V vocabulary, L layers.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gen_fast.errors import OpError
from gen_fast.model.batch import DeviceBatch, PackedBatch, on_device
from gen_fast.model.config import BackboneConfig, inverse_frequencies
from gen_fast.model.dropout import Dropout, RowDropout
from gen_fast.model.fingerprint import Fingerprint
from gen_fast.model.kv_cache import KVCache
from gen_fast.model.linear import (
    QuantizedRows,
    Rows,
    Weight,
    is_packed,
    linear,
    pack,
    row_format,
)
from gen_fast.model.lora import MATRICES
from gen_fast.model.update import FrozenLinear, Update
from gen_fast.ops.append import append
from gen_fast.ops.attention import AttentionOptions, attention
from gen_fast.ops.norm import add_rms_norm, add_rms_norm_quantized, rms_norm
from gen_fast.ops.rope import rope
from gen_fast.ops.swiglu import swiglu, swiglu_quantized


@dataclass(frozen=True)
class LayerWeights:
    """One block. Queries, keys and values share one matrix, and so do gate and up."""

    attention_norm: Tensor  # [h]
    qkv: Weight  # [(H + 2·KV)·D, h]
    qkv_bias: Tensor | None  # [(H + 2·KV)·D]
    qk_norm: Tensor | None  # [H + KV, D], Qwen3's weight of each query and key head
    out: Weight  # [h, H·D]
    mlp_norm: Tensor  # [h]
    gate_up: Weight  # [2f, h]
    down: Weight  # [h, f]

    def cast(self, dtype: torch.dtype) -> "LayerWeights":
        """Norms and biases in another dtype; the matrices must be quantised."""
        tensors = {name: x.to(dtype) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def packed(self) -> "LayerWeights":
        """The same, laid out as its device multiplies it fastest, where that gains anything.

        Packed weights have no views of parts.
        """
        return replace(self, **{name: pack(getattr(self, name)) for name in MATRICES})


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
    another (see weights.py); adapters and caches are checked against it. use_graphs: whether an
    Encoder or Decoder pads small batches to few shapes and records these, see graphs.py.
    """

    def __init__(
        self,
        config: BackboneConfig,
        embedding: Tensor,
        layers: tuple[LayerWeights, ...],
        final_norm: Tensor,
        fingerprint: Fingerprint,
    ) -> None:
        self.config = config
        self.embedding = embedding  # [V, h]
        self.layers = layers
        self.final_norm = final_norm  # [h]
        self.fingerprint = dict(fingerprint)
        self.use_graphs = embedding.device.type == "cuda"
        self._inverse_frequencies = inverse_frequencies(config)
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}
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
        return is_packed(self.layers[0].qkv)

    @property
    def quantize(self) -> str | None:
        """What the matrices of the layers are quantised to: one of QUANTIZED, or None."""
        weight = self.layers[0].qkv
        return None if isinstance(weight, Tensor) else weight.kind

    def forward(
        self,
        batch: PackedBatch,
        *,
        special: Tensor | None = None,
        prefix: PrefixKV | None = None,
        cache: KVCache | None = None,
        mask: str = "causal",
        update: Update | None = None,
        dropout: Dropout | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Return the residual stream [R, h] at the needed rows, before the final norm.

        special [k, h]: embeddings of ids V, V + 1, … . prefix: keys and values before each text.
        cache: the texts' own tokens so far, if they were begun in an earlier pass; the batch's are
        added. `batch.positions` must count both. mask: of attention, see AttentionOptions; the
        bidirectional one leaves out sliding windows, "gem" goes with `batch.blocks`.
        update: of the linears, a Lora or FullWeights.
        dropout: of attention's weights and an update's inputs; it goes with no prefix and no cache.
        recompute: keep only what goes from layer to layer for the backward pass, and run each layer
        again there.
        The last layer computes attention, its output and feed-forward for the needed rows only.
        Gradients reach `special` and `update`, nothing else.
        Raises OpError for a prefix or a cache under a bidirectional mask: what was computed of the
        first tokens would depend on those that follow; and for special blocks without the GEM mask,
        or that mask without them.
        """
        if (mask == "gem") != (batch.blocks is not None):
            raise OpError(
                "the gem mask goes with the special block of each text, PackedBatch.pack(blocks=), "
                f"and only with that: mask is {mask!r}, "
                f"{'no blocks were' if batch.blocks is None else 'blocks were'} packed"
            )
        if mask == "bidirectional" and (prefix is not None or cache is not None):
            raise OpError(
                "under a bidirectional mask the states of a prefix depend on the text behind it: "
                "run both together"
            )
        if recompute and cache is not None:
            raise OpError("a layer that is run again would be added to the cache twice")
        if dropout is not None and (prefix is not None or cache is not None):
            raise OpError("dropout goes with no prefix and no cache, which are computed without it")
        run = _Pass(
            self,
            batch.device_batch() if cache is None else cache.place(batch),
            special,
            prefix,
            cache,
            mask=mask,
            update=update,
            recompute=recompute,
        )
        if dropout is not None:
            run.set_dropout(dropout, 0.0 if update is None else update.dropout, batch)
        return run.stream()

    def run(
        self,
        batch: DeviceBatch,
        *,
        special: Tensor | None = None,
        prefix: PrefixKV | None = None,
        cache: KVCache | None = None,
        mask: str = "causal",
    ) -> Tensor:
        """`forward` for a batch that is on the device, and has its place in the cache if any.

        The host is not stopped, and no shape depends on a value: on a GPU it can be recorded.
        """
        return _Pass(self, batch, special, prefix, cache, mask=mask).stream()

    def new_cache(
        self, capacities: Sequence[int] | np.ndarray, *, padding_rows: int = 0
    ) -> KVCache:
        """An empty cache for texts of at most `capacities[i]` tokens each."""
        return KVCache(
            self.config,
            capacities,
            padding_rows=padding_rows,
            dtype=self.dtype,
            device=self.device,
        )

    def prefill(self, ids: tuple[int, ...]) -> PrefixKV:
        """Run a prefix once and keep every layer's keys and values."""
        batch = PackedBatch.pack([np.array(ids, dtype=np.int64)], needed=[0], device=self.device)
        kept: list[tuple[Tensor, Tensor]] = []
        _Pass(self, batch.device_batch(), keep_kv=kept).stream()
        return PrefixKV(tuple(ids), tuple(kept))

    def rotary_rows(self, positions: Tensor, needed: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, D/2] of positions below `needed`, float32, from a table.

        Tables have sizes of powers of two and stay where they are, for CUDA graphs.
        """
        size = 1 << max(needed - 1, 511).bit_length()
        table = self._rotary.get(size)
        if table is None:
            with self._rotary_lock:
                table = self._rotary.get(size)
                if table is None:
                    table = self._rotary[size] = self._rotary_table(size)
        cos, sin = table
        return cos[positions], sin[positions]

    def _rotary_table(self, size: int) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.dtype, torch.float32)
        angles = torch.arange(size, dtype=dtype).unsqueeze(1) * self._inverse_frequencies
        return angles.cos().to(self.device), angles.sin().to(self.device)


class _Pass:
    """One pass of a batch through the layers: what they share, and how each is run."""

    def __init__(
        self,
        backbone: Backbone,
        batch: DeviceBatch,
        special: Tensor | None = None,
        prefix: PrefixKV | None = None,
        cache: KVCache | None = None,
        *,
        mask: str = "causal",
        update: Update | None = None,
        recompute: bool = False,
        keep_kv: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """keep_kv: a list that gets the keys and values of every layer."""
        self._backbone, self._config = backbone, backbone.config
        self._prefix, self._cache, self._special = prefix, cache, special
        self._mask, self._recompute = mask, recompute
        self._update = None if update is None else update.cast(backbone.dtype)
        self._kept = keep_kv
        # Norm and activation then quantise what they give in the same pass; they have no gradient.
        formats = {row_format(layer.qkv) for layer in backbone.layers}
        fused = len(formats) == 1 and update is None and not torch.is_grad_enabled()
        self._row_format = formats.pop() if fused else None
        ids, positions, needed = batch.ids, batch.positions, batch.needed
        self._n_tokens = len(ids)
        self._n_needed = self._n_tokens if needed is None else len(needed)
        if backbone.packed:
            ids, positions = with_padding_rows(ids), with_padding_rows(positions)
            needed = None if needed is None else with_padding_rows(needed)
        self._ids, self._needed = ids, needed
        self._drop_attention: dict[str, Any] = {}
        # Of all rows, and of the needed ones.
        self._drop_rows: list[RowDropout | None] = [None, None]
        self._batch = batch
        longest = batch.longest + (0 if prefix is None else len(prefix))
        self._cos, self._sin = backbone.rotary_rows(positions, longest)
        # By window, and whether the queries are those of all rows.
        self._options: dict[tuple[int | None, bool], AttentionOptions] = {}

    def set_dropout(self, dropout: Dropout, of_rows: float, batch: PackedBatch) -> None:
        """of_rows: what the update drops of its inputs. batch: the one that is run."""
        if dropout.attention:
            keys = np.asarray(dropout.text_keys, dtype=np.int64)
            self._drop_attention = {
                "dropout": dropout.attention,
                "seed": dropout.seed,
                "text_keys": on_device(keys, batch.ids.device),
            }
        if of_rows:
            rows = RowDropout.of_batch(of_rows, dropout, batch).padded(len(self._ids))
            needed = rows if self._needed is None else rows.at(self._needed)
            self._drop_rows = [rows, needed]

    def stream(self) -> Tensor:
        """The residual stream [R, h] at the needed rows."""
        backbone = self._backbone
        stream = append(backbone.embedding, self._special, self._ids)  # [T, h]
        normed: Rows = rms_norm(stream, backbone.layers[0].attention_norm, self._config.norm_eps)
        for i in range(self._config.num_layers - 1):
            if self._recompute:
                # Dropout is drawn by place: there is no state of a generator to be kept.
                normed, stream = checkpoint(
                    self._layer, i, normed, stream, use_reentrant=False, preserve_rng_state=False
                )
            else:
                normed, stream = self._layer(i, normed, stream)
        return self._last_layer(normed, stream)

    def _layer(self, i: int, normed: Rows, stream: Tensor) -> tuple[Rows, Tensor]:
        """The normed stream and the stream [T, h] behind a layer that is not the last."""
        q, k, v = self._qkv(i, normed)
        mixed = self._attention(i, q, k, v, self._batch.cu_seqlens)
        mixed, stream = self._feed_forward(i, mixed, stream, inplace=not self._recompute)
        following = self._backbone.layers[i + 1].attention_norm
        return self._add_norm(mixed, stream, following, inplace=True)

    def _last_layer(self, normed: Rows, stream: Tensor) -> Tensor:
        """The stream [R, h] behind the last layer: queries are those of the needed rows alone."""
        i = self._config.num_layers - 1
        q, k, v = self._qkv(i, normed)
        if self._needed is not None:
            q, stream = q[self._needed], stream[self._needed]
            if not self._n_needed:
                return stream
        mixed = self._attention(i, q, k, v, self._batch.cu_needed)
        mixed, stream = self._feed_forward(i, mixed, stream, inplace=True)
        return (stream + mixed)[: self._n_needed]

    def _feed_forward(
        self, i: int, mixed: Tensor, stream: Tensor, *, inplace: bool
    ) -> tuple[Tensor, Tensor]:
        """What layer i adds to the stream last, and the stream to add it to."""
        layer = self._backbone.layers[i]
        normed, stream = self._add_norm(mixed, stream, layer.mlp_norm, inplace=inplace)
        activated = self._swiglu(self._linear(i, "gate_up", normed))
        return self._linear(i, "down", activated), stream

    def _add_norm(
        self, x: Tensor, stream: Tensor, weight: Tensor, *, inplace: bool
    ) -> tuple[Rows, Tensor]:
        """The normed sum of x and the stream, and the sum. inplace: of the stream."""
        eps = self._config.norm_eps
        if self._row_format is None:
            return add_rms_norm(x, stream, weight, eps, inplace=inplace)
        q, scale, total = add_rms_norm_quantized(x, stream, weight, eps, self._row_format)
        return QuantizedRows(q, scale, x.dtype), total

    def _swiglu(self, gate_up: Tensor) -> Rows:
        if self._row_format is None:
            return swiglu(gate_up)
        return QuantizedRows(*swiglu_quantized(gate_up, self._row_format), gate_up.dtype)

    def _attention(self, i: int, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor) -> Tensor:
        """Attention and its output projection [rows of q, h]."""
        mixed = attention(q, k, v, self._options_of(i, cu_queries))
        return self._linear(i, "out", mixed.flatten(1))

    def _options_of(self, i: int, cu_queries: Tensor) -> AttentionOptions:
        """Layers that can share their options do, and what is made of them once a batch."""
        window = None if self._mask == "bidirectional" else self._config.windows[i]
        kind = window, cu_queries is self._batch.cu_seqlens
        options = self._options.get(kind)
        if options is None:
            options = self._options[kind] = AttentionOptions(
                cu_queries,
                self._batch.cu_keys,
                window=window,
                mask=self._mask,
                blocks=self._batch.blocks,
                **self._drop_attention,
            )
        if self._prefix is not None:
            options = options.with_prefix(*self._prefix.layers[i])
        return options.with_layer(i)

    def _qkv(self, i: int, normed: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q [T, H, D]; rotated k and v [Tk, KV, D], those of a cache among them."""
        config, layer = self._config, self._backbone.layers[i]
        n_q, n_kv = config.num_heads, config.num_kv_heads
        fused = self._linear(i, "qkv", normed, layer.qkv_bias)
        qk, v = fused.unflatten(-1, (-1, config.head_dim)).split([n_q + n_kv, n_kv], dim=1)
        if fused.requires_grad and layer.qk_norm is None:
            # Attention keeps v for its gradient: a view would keep q and k before the rotation too.
            v = v.contiguous()
        qk = rope(qk, self._cos, self._sin, layer.qk_norm, config.norm_eps, inplace=True)
        q, k = qk.split([n_q, n_kv], dim=1)
        n = self._n_tokens
        if self._kept is not None:
            self._kept.append((k[:n].contiguous(), v[:n].contiguous()))
        if self._cache is not None:
            assert self._batch.cache_rows is not None
            k, v = self._cache.extend(i, self._batch.cache_rows, k[:n], v[:n])
        return q, k, v

    def _linear(self, i: int, matrix: str, x: Rows, bias: Tensor | None = None) -> Tensor:
        """x [rows, in] through a matrix of layer i, a name of LayerWeights."""
        weight = getattr(self._backbone.layers[i], matrix)
        if self._update is None:
            return linear(x, weight, bias)
        assert isinstance(x, Tensor)
        last = i == self._config.num_layers - 1 and matrix != "qkv"
        frozen = FrozenLinear(i, matrix, weight, bias)
        return self._update.linear(x, frozen, self._drop_rows[last])


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
