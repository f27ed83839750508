"""Reads an LLM2Vec-Gen embedding back: the text that its soft prompts make the backbone say.

Source: LLM2Vec-Gen, arXiv 2603.10913, §5.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from gen_fast.embed.encoder import Encoder
from gen_fast.errors import AdapterError
from gen_fast.model.batch import PackedBatch
from gen_fast.model.generation import Answer, Decoder, end_token_ids
from gen_fast.model.weights import load_head
from gen_fast.ops.norm import rms_norm


class Reader:
    """Decodes what an encoder with an adapter has understood. Raises AdapterError without one."""

    def __init__(self, encoder: Encoder) -> None:
        if encoder.adapter is None or encoder.source is None:
            raise AdapterError(f"{encoder.name} has no adapter: only soft prompts can be read back")
        self._encoder = encoder
        self._adapter = encoder.adapter
        self._decoder = Decoder(
            encoder.backbone,
            load_head(encoder.source, encoder.backbone),
            end_token_ids(encoder.source, encoder._tokenizer.eos_token_id),
        )

    @torch.inference_mode()
    def soft_prompts(self, texts: Sequence[str], prompt: str = "") -> Tensor:
        """The soft prompts S of each text behind `prompt`: [n, C, h] float32."""
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
        """Greedy text of soft prompts [n, C, h], a batch of all."""
        n, c, _ = soft_prompts.shape
        vocabulary = self._encoder.backbone.config.vocab_size
        ids = np.arange(vocabulary, vocabulary + n * c).reshape(n, c)
        decoded = self._decoder.decode(
            list(ids), max_new_tokens, special=soft_prompts.flatten(0, 1)
        )
        tokenizer = self._encoder._tokenizer
        return [Answer(tokenizer.decode(new), why) for new, why in decoded]
