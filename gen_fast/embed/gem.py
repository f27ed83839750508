"""GEM: special tokens behind the text, that see it and not each other (arXiv 2506.04344).

gem           the mean of their final-norm states, or these side by side, as the model was trained
"""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from gen_fast.embed import layouts
from gen_fast.embed.choices import GEM
from gen_fast.embed.layouts import Layout
from gen_fast.embed.methods import Method
from gen_fast.errors import BackboneMismatchError, UnsupportedModelError
from gen_fast.formats.gem import SpecialTokens
from gen_fast.formats.sentence_export import SentenceModules
from gen_fast.model.backbone import Backbone
from gen_fast.model.fingerprint import Fingerprint
from gen_fast.model.tokenizing import Tokenizer
from gen_fast.ops.norm import rms_norm


class GEMMethod(Method):
    """gem: a model of GEM, whose adapter, if it has one, has been merged into the backbone."""

    mask: ClassVar[str] = "gem"

    def __init__(self, tokens: SpecialTokens) -> None:
        super().__init__(GEM)
        self._tokens, self._settings = tokens, tokens.settings
        self.max_length = self._settings.max_length
        if self._settings.pooling == "concat":
            self.dimension = tokens.special.numel()
        self._first_id = 0  # of the special tokens: the backbone's vocabulary, once it is bound

    def check_backbone(self, fingerprint: Fingerprint) -> None:
        """See Method. What the adapter was trained over is checked where it is read."""
        width = self._tokens.special.shape[1]
        if width != fingerprint["hidden_size"]:
            raise BackboneMismatchError(
                f"the special tokens have {width} dimensions, the backbone has "
                f"{fingerprint['hidden_size']}"
            )

    def bound(self, backbone: Backbone, tokenizer: Tokenizer, source: Path) -> Self:
        """See Method."""
        self.check_backbone(backbone.fingerprint)
        method = copy.copy(self)
        method._first_id = backbone.config.vocab_size
        method.special = self._tokens.special.to(backbone.device, backbone.dtype)
        return method

    def layout(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, prompt_name: str | None
    ) -> Layout:
        """See Method."""
        m = self._settings.n_special
        return layouts.SpecialTokens(tokenizer, prompt, max_length, self._first_id, m, m)

    def blocks(self, needed: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See Method. The special tokens are what is pooled, and end a text."""
        return np.stack((lengths - needed, lengths), axis=1)

    def pool(
        self, hidden: Tensor, cu_seqlens: Tensor, row_weights: Tensor | None, backbone: Backbone
    ) -> Tensor:
        """See Method."""
        if self._settings.pooling == "mean":
            return super().pool(hidden, cu_seqlens, row_weights, backbone)
        states = rms_norm(hidden.float(), backbone.final_norm.float(), backbone.config.norm_eps)
        return states.reshape(len(cu_seqlens) - 1, -1)

    def identity(self) -> dict[str, Any]:
        """See Method."""
        special = self._tokens.special.contiguous().numpy().tobytes()
        return {
            "adapter": hashlib.sha256(special).hexdigest()[:16],
            "max_length": self.max_length,
            "gem": asdict(self._settings),
        }

    def sentence_modules(self, tokenizer: Tokenizer, prompts: Mapping[str, str]) -> SentenceModules:
        """See Method. Raises UnsupportedModelError."""
        raise UnsupportedModelError(
            "sentence-transformers has no attention mask in which the special tokens of GEM do "
            "not see each other: it cannot be exported"
        )
