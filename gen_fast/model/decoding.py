"""Decoding: sequences continued token by token, over the same weights, with a KV cache."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.backbone import Backbone, PrefixKV, padded_rows
from gen_fast.model.batch import DeviceBatch, PackedBatch, on_device
from gen_fast.model.buckets import next_power_of_two, padded
from gen_fast.model.graphs import Graphs
from gen_fast.model.kv_cache import KVCache
from gen_fast.model.linear import linear, pack
from gen_fast.model.memory import free_memory
from gen_fast.model.sampling import GREEDY, Sampling, next_tokens
from gen_fast.ops.norm import rms_norm

FinishReason = Literal["stop", "length"]

# Sequences that are decoded at once.
BATCH_SIZE = 64
# Their keys and values, on a CPU: 64 sequences of 600 tokens of an 8B model in bf16 take 5.7 GB.
KV_BYTES = 8 << 30
# Those that wait come in together once one place in so many is free: a pass that reads prompts is
# longer than one that does not, and all texts wait for it.
REFILL_SHARE = 8


class Decoder:
    """Continues token sequences, many at a time: prefill, then one pass a token.

    A sequence that ends makes room for one that waits, whose prefill is part of the next pass of
    the others (continuous batching: Orca, Yu et al., OSDI 2022).
    head [V, h]: the language-model head. end_ids: tokens that end a text; they are not returned.
    """

    def __init__(self, backbone: Backbone, head: Tensor, end_ids: Sequence[int]) -> None:
        self.backbone = backbone
        # Training has neither, and shares its head with the embeddings.
        for_inference = backbone.packed or backbone.quantize is not None
        self._head = pack(head) if for_inference else head
        self._end_ids = np.array(sorted(set(end_ids)), dtype=np.int64)

    def decode(
        self,
        sequences: Sequence[np.ndarray],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        special: Tensor | None = None,
        prefix: PrefixKV | None = None,
        blocks: np.ndarray | None = None,
        uniform: np.ndarray | None = None,
        batch_size: int = BATCH_SIZE,
        kv_bytes: int | None = None,
    ) -> list[tuple[np.ndarray, FinishReason]]:
        """Continue each sequence of ids [n_i] by at most `max_new_tokens`: new ids, why it ended.

        special [k, h]: embeddings of ids V, V + 1, …, such as the soft prompts of an embedding.
        prefix: keys and values before each sequence. blocks [n, 2]: special tokens of each sequence
        under the GEM mask, see PackedBatch; what is written sees these and not what comes before
        them. uniform [n, max_new_tokens] float64: numbers from [0, 1) that tokens are drawn by, if
        they are. batch_size: sequences that are run at once, at most. kv_bytes: memory of their
        keys and values, at most, but for a single sequence; None takes KV_BYTES, and on a GPU half
        of what is free.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        run = _Decoding(
            self,
            sequences,
            max_new_tokens,
            sampling,
            special=special,
            prefix=prefix,
            blocks=blocks,
            uniform=uniform,
        )
        return run.results(batch_size, self._kv_bytes() if kv_bytes is None else kv_bytes)

    def _kv_bytes(self) -> int:
        device = self.backbone.device
        return free_memory(device) // 2 if device.type == "cuda" else KV_BYTES

    def is_end(self, tokens: np.ndarray) -> np.ndarray:
        """Which of the tokens end a text."""
        return np.isin(tokens, self._end_ids)

    def next(self, hidden: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
        """The token after each row of `hidden` [B, h]: [B] int64. uniform [B]: of the draws."""
        backbone = self.backbone
        states = rms_norm(hidden, backbone.final_norm, backbone.config.norm_eps)
        count = len(states)
        if self._head.is_mkldnn:  # few numbers of rows, see padded_rows
            states = torch.nn.functional.pad(states, (0, 0, 0, padded_rows(count) - count))
        logits = linear(states, self._head)[:count]
        return next_tokens(logits, sampling, uniform)


class _Decoding:
    """One call of `Decoder.decode`: which sequence is in which place of the KV cache."""

    def __init__(
        self,
        decoder: Decoder,
        sequences: Sequence[np.ndarray],
        max_new_tokens: int,
        sampling: Sampling,
        *,
        special: Tensor | None,
        prefix: PrefixKV | None,
        blocks: np.ndarray | None,
        uniform: np.ndarray | None,
    ) -> None:
        self._decoder, self._backbone = decoder, decoder.backbone
        self._sequences, self._blocks, self._uniform = sequences, blocks, uniform
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._special, self._prefix = special, prefix
        # They read this call's cache, and end with it.
        self._graphs = Graphs(self._backbone.device) if self._backbone.use_graphs else None
        self._written: list[list[int]] = [[] for _ in sequences]
        self._reasons: list[FinishReason] = ["length"] * len(sequences)

    def results(self, batch_size: int, kv_bytes: int) -> list[tuple[np.ndarray, FinishReason]]:
        """See Decoder.decode."""
        lengths = np.array([len(ids) for ids in self._sequences], dtype=np.int64)
        # Longest first: whichever place becomes free, those that wait fit in it.
        order = np.argsort(-lengths, kind="stable")
        capacities = lengths[order] + self._max_new_tokens - 1
        fitting = np.searchsorted(
            capacities.cumsum() * kv_bytes_per_token(self._backbone), kv_bytes, side="right"
        )
        places = max(1, min(batch_size, int(fitting)))
        cache = self._backbone.new_cache(capacities[:places], padding_rows=1)
        waiting = deque(order.tolist())
        # The sequence in each place of the cache, or -1, and what is run of it next.
        held = np.full(len(cache.lengths), -1)
        following: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(held)
        least_free = max(1, len(held) // REFILL_SHARE)
        while True:
            free = np.flatnonzero(held < 0)
            if waiting and len(free) >= min(least_free, len(waiting)):
                for place in free[: len(waiting)].tolist():
                    held[place] = waiting.popleft()
                    following[place] = self._sequences[held[place]]
                    cache.lengths[place] = 0
            cache.active = np.flatnonzero(held >= 0)
            if not len(cache.active):
                break
            rows, texts = [following[i] for i in cache.active], held[cache.active]
            if self._graphs is not None and all(len(ids) == 1 for ids in rows):
                tokens = self._step_in_bucket(self._graphs, cache, np.concatenate(rows), texts)
            else:
                tokens = self._step(cache, rows, texts)
            ended = self._decoder.is_end(tokens)
            for place, token, end in zip(cache.active.tolist(), tokens, ended, strict=True):
                text = held[place]
                if end:
                    self._reasons[text] = "stop"
                else:
                    self._written[text].append(int(token))
                if end or len(self._written[text]) == self._max_new_tokens:
                    held[place] = -1
                following[place] = np.array([token])
        return [
            (np.array(ids, dtype=np.int64), why)
            for ids, why in zip(self._written, self._reasons, strict=True)
        ]

    def _step(self, cache: KVCache, rows: list[np.ndarray], texts: np.ndarray) -> np.ndarray:
        """The token after each of `rows`, which continue the active texts of the cache."""
        backbone, device = self._backbone, self._backbone.device
        batch = PackedBatch.pack(
            rows,
            needed=[1] * len(rows),
            prefix_length=cache.held + (0 if self._prefix is None else len(self._prefix)),
            blocks=None if self._blocks is None else self._blocks[texts],
            device=device,
        )
        hidden = backbone.forward(
            batch,
            special=self._special,
            prefix=self._prefix,
            cache=cache,
            mask="causal" if self._blocks is None else "gem",
        )
        uniform = self._numbers(texts)
        numbers = None if uniform is None else on_device(uniform, device)
        return self._decoder.next(hidden, self._sampling, numbers).cpu().numpy()

    def _step_in_bucket(
        self, graphs: Graphs, cache: KVCache, tokens: np.ndarray, texts: np.ndarray
    ) -> np.ndarray:
        """`_step` for one token a text, padded to a power of two of rows, whose graph is kept."""
        count, shared = len(tokens), 0 if self._prefix is None else len(self._prefix)
        rows = next_power_of_two(count)
        positions = cache.held + shared
        placed = cache.place_rows(
            np.ones(count, dtype=np.int64),
            np.ones(count, dtype=np.int64),
            None if self._blocks is None else self._blocks[texts],
            as_two=True,
        )
        del placed["cu_needed"]  # all rows are
        arrays = {
            "ids": padded(tokens, rows),
            "positions": padded(positions, rows),
            **placed,
            "cache_rows": np.full(rows, cache.padding_row),
        }
        arrays["cache_rows"][:count] = placed["cache_rows"]
        uniform = self._numbers(texts)
        if uniform is not None:
            arrays["uniform"] = padded(uniform, rows)
        longest = int(np.diff(cache.starts).max())

        def next_tokens(tensors: Mapping[str, Tensor]) -> Tensor:
            hidden = self._backbone.run(
                DeviceBatch.of(tensors, longest),
                special=self._special,
                prefix=self._prefix,
                cache=cache,
                mask="causal" if self._blocks is None else "gem",
            )
            return self._decoder.next(hidden, self._sampling, tensors.get("uniform"))

        return graphs.run(rows, arrays, next_tokens)[:count].cpu().numpy()

    def _numbers(self, texts: np.ndarray) -> np.ndarray | None:
        """The number by which the next token of each text is drawn, if it is."""
        if self._uniform is None:
            return None
        return self._uniform[texts, [len(self._written[text]) for text in texts]]


def kv_bytes_per_token(backbone: Backbone) -> int:
    """Memory of one token's keys and values in all layers, in bytes."""
    return 2 * backbone.config.num_layers * backbone.config.kv_size * backbone.dtype.itemsize
