"""Reads an embedding back: the text that its special tokens make the backbone say.

LLM2Vec-Gen's soft prompts stand before the text that is written; of GEM's special tokens the keys
and values are seen, and nothing of the text before them.
Sources: LLM2Vec-Gen, arXiv 2603.10913, §5; GEM, arXiv 2506.04344, §5.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from gen_fast.embed.adapter import Adapter
from gen_fast.embed.encoder import Encoder
from gen_fast.embed.gem import GEMMethod
from gen_fast.errors import AdapterError, ConfigError
from gen_fast.model.batch import PackedBatch
from gen_fast.model.decoding import Decoder
from gen_fast.model.generation import Answer, end_token_ids
from gen_fast.model.tokenizing import special_tokens_around
from gen_fast.model.weights import load_head
from gen_fast.ops.norm import rms_norm


class Reader:
    """Decodes what an encoder of LLM2Vec-Gen or GEM has understood. Raises AdapterError for others.

    An embedding of GEM alone cannot be read: what is read are keys and values of every layer.
    """

    def __init__(self, encoder: Encoder) -> None:
        is_gem = isinstance(encoder._method, GEMMethod)
        if not (encoder.adapter or is_gem) or encoder.source is None:
            raise AdapterError(
                f"{encoder.name} has no adapter: only soft prompts of llm2vec-gen and special "
                "tokens of gem can be read back"
            )
        self._encoder = encoder
        self._decoder = Decoder(
            encoder.backbone,
            load_head(encoder.source, encoder.backbone),
            end_token_ids(encoder.source, encoder._tokenizer.eos_token_id),
        )

    @property
    def _adapter(self) -> Adapter:
        if self._encoder.adapter is None:
            raise AdapterError(
                f"{self._encoder.name} has no soft prompts: give read_texts the texts"
            )
        return self._encoder.adapter

    @torch.inference_mode()
    def soft_prompts(self, texts: Sequence[str], prompt: str = "") -> Tensor:
        """LLM2Vec-Gen's soft prompts S of each text behind `prompt`: [n, C, h] float32."""
        encoder, adapter, backbone = self._encoder, self._adapter, self._encoder.backbone
        sequences = encoder._layout(prompt)(texts, 0)
        batch = PackedBatch.pack(
            sequences.ids,
            needed=sequences.needed,
            device=backbone.device,
        )
        special = adapter.special.to(backbone.device, backbone.dtype)
        stream = backbone.forward(batch, special=special)
        states = rms_norm(stream, backbone.final_norm, backbone.config.norm_eps).float()
        if adapter.reconstruction is not None:
            states = linear(states, *(t.to(states.device) for t in adapter.reconstruction))
        soft: Tensor = states.unflatten(0, (len(texts), adapter.n_compression))
        return soft

    @torch.inference_mode()
    def read(self, soft_prompts: Tensor, max_new_tokens: int = 128) -> list[Answer]:
        """Greedy text of soft prompts [n, C, h], up to 64 at a time."""
        n, c, _ = soft_prompts.shape
        assert c == self._adapter.n_compression
        vocabulary = self._encoder.backbone.config.vocab_size
        ids = np.arange(vocabulary, vocabulary + n * c).reshape(n, c)
        decoded = self._decoder.decode(
            list(ids), max_new_tokens, special=soft_prompts.flatten(0, 1)
        )
        tokenizer = self._encoder._tokenizer
        return [Answer(tokenizer.decode(new), why) for new, why in decoded]

    @torch.inference_mode()
    def read_texts(
        self,
        texts: Sequence[str],
        prompt: str = "",
        max_new_tokens: int = 128,
        *,
        starts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Embed texts behind `prompt` and read them back greedily, up to 64 at a time.

        starts: of GEM, how the reading of each text begins, which is part of the answer. Training
        never asks the special tokens for the first token behind them. Where the tokenizer puts a
        token before every text, the reading begins with that; elsewhere, without a start, with
        what the last special token happens to tell.
        Raises ConfigError for starts of another method or number.
        """
        encoder = self._encoder
        if encoder.adapter is not None:
            if starts is not None:
                raise ConfigError("starts are for GEM models: soft prompts tell the first token")
            return self.read(self.soft_prompts(texts, prompt), max_new_tokens)
        if starts is not None and len(starts) != len(texts):
            raise ConfigError(f"{len(starts)} starts for {len(texts)} texts")
        tokenizer, method = encoder._tokenizer, encoder._method
        sequences = encoder._layout(prompt)(texts, 0)
        lengths = np.array([len(ids) for ids in sequences.ids], dtype=np.int64)
        before, _ = special_tokens_around(tokenizer.core)
        given = [
            np.array(tokenizer.core.encode(start, add_special_tokens=False).ids, dtype=np.int64)
            for start in starts or [""] * len(texts)
        ]
        begun = [
            np.concatenate((ids, before, start)).astype(np.int64)
            for ids, start in zip(sequences.ids, given, strict=True)
        ]
        decoded = self._decoder.decode(
            begun,
            max_new_tokens,
            special=method.special,
            blocks=method.blocks(sequences.needed, lengths),
        )
        return [
            Answer(tokenizer.decode(np.concatenate((start, new)).astype(np.int64)), why)
            for start, (new, why) in zip(given, decoded, strict=True)
        ]
