"""What is embedded: each method is one object.

llm2vec-gen   the trained compression tokens after the text (arXiv 2603.10913)
mean          mean over the text's own tokens
weighted-mean position-weighted mean, later tokens count more (SGPT, arXiv 2202.08904, eq. 2)
last-token    the state of the last token
echo          the text twice, mean over the second copy (arXiv 2402.15449)
hyde          a query: the mean over the answers that the model writes to it, and the query itself;
              a text behind the prompt named "document": as it is (HyDE, arXiv 2212.10496)
sentence-transformers  the whole text, as a directory in that package's layout says

Those that attend to later tokens are in llm2vec.py, GEM is in gem.py.
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from gen_fast.embed import layouts
from gen_fast.embed.adapter import DEFAULT_PROMPTS, Adapter
from gen_fast.embed.choices import LLM2VEC_GEN, SENTENCE_TRANSFORMERS
from gen_fast.embed.layouts import Layout
from gen_fast.errors import ConfigError, UnsupportedModelError
from gen_fast.formats.sentence_export import SentenceModules
from gen_fast.formats.sentence_modules import Pooling
from gen_fast.formats.sentence_transformers import SentenceModel
from gen_fast.model.backbone import Backbone
from gen_fast.model.fingerprint import Fingerprint
from gen_fast.model.generation import AnswerGenerator
from gen_fast.model.linear import linear, pack
from gen_fast.model.sampling import Sampling
from gen_fast.model.tokenizing import (
    Tokenizer,
    lower_case,
    special_tokens,
    special_tokens_around,
    token_names,
)
from gen_fast.ops.norm import rms_norm
from gen_fast.ops.pool import pool

Projection = tuple[Tensor, Tensor]


class Method(ABC):
    """How texts become embeddings: what is run of each, which rows are pooled, and how.

    Made from files alone; `bound` gives the same method at work with a loaded backbone.

    name: of METHODS. prompts: the instructions that have names; default_prompt_name: the one used
    where none is asked for. max_length: tokens of a text with everything around it; None sets no
    limit. dimension: of an embedding where a call asks for no other; None is the backbone's hidden
    size. full_dimension: the most that a call may ask for. special [k, h]: embeddings of the
    token ids V, V + 1, … . projection: (weight [d, h], bias [d]) applied to what has been pooled.
    writes: the model writes while texts are laid out. mask: of attention, "causal", "gem" or
    "bidirectional"; under the last a layout shares no rows, because a prompt's states depend on
    the text behind it.
    """

    prompts: Mapping[str, str] = dict.fromkeys(DEFAULT_PROMPTS, "")
    default_prompt_name: str | None = None
    similarity_fn_name: str = "cosine"
    max_length: int | None = None
    dimension: int | None = None
    full_dimension: int | None = None
    special: Tensor | None = None
    projection: Projection | None = None
    writes: ClassVar[bool] = False
    mask: ClassVar[str] = "causal"

    def __init__(self, name: str) -> None:
        self.name = name

    def check_backbone(  # noqa: B027 - most fit any
        self, fingerprint: Fingerprint
    ) -> None:
        """Raise BackboneMismatchError if the method was made for another backbone."""

    def prepare(self, tokenizer: Tokenizer) -> None:  # noqa: B027 - most take it as it is
        """Make a tokenizer, just loaded, read texts as the method does."""

    def bound(self, backbone: Backbone, tokenizer: Tokenizer, source: Path) -> Self:
        """The method with its tensors where the backbone is. source: the backbone's directory."""
        return self

    @abstractmethod
    def layout(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, prompt_name: str | None
    ) -> Layout:
        """Lays out the texts of one call, behind `prompt`, which may have a name."""

    def blocks(self, needed: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """Special blocks [B, 2] of the texts of a batch, see PackedBatch; None for other masks.

        needed [B]: pooled rows of each text, its last ones. lengths [B]: rows of each text that are
        run, a shared prefix not among them.
        """
        return None

    def row_weights(self, needed: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """Pooling weights of the rows [sum(needed)], float32; None for the plain mean.

        needed [B]: pooled rows of each text, its last ones. lengths [B]: all rows of each text.
        """
        return None

    def pool(
        self, hidden: Tensor, cu_seqlens: Tensor, row_weights: Tensor | None, backbone: Backbone
    ) -> Tensor:
        """Embeddings [B, d] float32 of what `Backbone.forward` gave for a batch, [R, h].

        cu_seqlens [B + 1]: of the needed rows; those beyond are padding. row_weights [R]: what the
        method of that name gave. The host is not stopped, and no shape depends on a value.
        """
        pooled = pool(
            hidden, cu_seqlens, backbone.final_norm, backbone.config.norm_eps, row_weights
        )
        return pooled if self.projection is None else linear(pooled, *self.projection)

    def identity(self) -> dict[str, Any]:
        """What decides an embedding besides name, prompts, backbone and tokenizer, as JSON."""
        return {"adapter": None, "max_length": None}

    def whole_identity(self, fingerprint: Fingerprint, tokenizer: Tokenizer) -> dict[str, Any]:
        """What decides an embedding with a backbone of this fingerprint, as JSON."""
        return {
            "method": self.name,
            "dimension": self.dimension or fingerprint["hidden_size"],
            "prompts": dict(self.prompts),
            "backbone": fingerprint,
            "tokenizer": hashlib.sha256(tokenizer.core.to_str().encode()).hexdigest()[:16],
            **self.identity(),
        }

    def sentence_modules(self, tokenizer: Tokenizer, prompts: Mapping[str, str]) -> SentenceModules:
        """The method in modules of sentence-transformers, for an encoder with these prompts.

        Raises UnsupportedModelError where those modules do not compute it exactly.
        """
        raise UnsupportedModelError(
            f"sentence-transformers has no modules that compute the method {self.name!r}"
        )


class OwnTokens(Method):
    """mean, weighted-mean and last-token: over the tokens of the text, not those of the prompt."""

    def layout(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, prompt_name: str | None
    ) -> Layout:
        """See Method."""
        last_only = self.name == "last-token"
        return layouts.OwnTokens(
            tokenizer, prompt, max_length, method=self.name, last_only=last_only
        )

    def row_weights(self, needed: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """See Method."""
        return position_weights(needed) if self.name == "weighted-mean" else None

    def sentence_modules(self, tokenizer: Tokenizer, prompts: Mapping[str, str]) -> SentenceModules:
        """See Method. A mean is exported without prompts: where they end is counted otherwise."""
        if self.name == "last-token":
            return SentenceModules(Pooling("lasttoken"))
        named = [name for name, prompt in prompts.items() if prompt]
        if named:
            raise UnsupportedModelError(
                f"sentence-transformers does not leave the tokens of the prompt {named[0]!r} out "
                f"as the method {self.name!r} does: export without prompts"
            )
        before, after = special_tokens_around(tokenizer.core)
        if not len(before):
            mode = "mean" if self.name == "mean" else "weightedmean"
            return SentenceModules(Pooling(mode, include_prompt=False))
        if self.name == "weighted-mean" or np.isin(before, after).any():
            raise UnsupportedModelError(
                f"the tokenizer puts special tokens before a text, which the method {self.name!r} "
                "leaves out and sentence-transformers' modules cannot"
            )
        weights = dict.fromkeys(token_names(tokenizer.core, before), 0.0)
        return SentenceModules(Pooling("mean"), word_weights=weights)


class Echo(Method):
    """echo: the text twice, pooled over the second copy."""

    def layout(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, prompt_name: str | None
    ) -> Layout:
        """See Method."""
        return layouts.Echo(tokenizer, prompt, max_length)


@dataclass(frozen=True)
class HyDESettings:
    """How HyDE answers a query.

    answers: drawn for each query. max_new_tokens: of the longest. temperature, seed: of the draws,
    which follow from the seed, the query and its prompt. answers and temperature are those of the
    authors' code. Raises ConfigError. Source: HyDE, arXiv 2212.10496.
    """

    answers: int = 8
    max_new_tokens: int = 128
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if self.answers < 1 or self.max_new_tokens < 1 or self.temperature < 0:
            raise ConfigError(
                f"HyDE: answers {self.answers} and max_new_tokens {self.max_new_tokens} must be at "
                f"least 1, temperature {self.temperature} at least 0"
            )
        if self.answers > 1 and not self.temperature:
            raise ConfigError(f"{self.answers} answers at temperature 0 are all the same: take 1")


class HyDE(Method):
    """hyde: the mean over answers that the model writes, and the query itself.

    one_by_one: an answer written alone has the same bits whatever else is answered.
    """

    writes = True
    _writer: AnswerGenerator | None = None

    def __init__(
        self, name: str, settings: HyDESettings = HyDESettings(), *, one_by_one: bool = False
    ) -> None:
        super().__init__(name)
        self._settings = settings
        self._one_by_one = one_by_one

    def bound(self, backbone: Backbone, tokenizer: Tokenizer, source: Path) -> Self:
        """See Method."""
        method = copy.copy(self)
        method._writer = AnswerGenerator(
            backbone,
            source,
            tokenizer,
            max_new_tokens=self._settings.max_new_tokens,
            batch_size=1 if self._one_by_one else 64,
            sampling=Sampling(self._settings.temperature, seed=self._settings.seed),
        )
        return method

    def layout(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, prompt_name: str | None
    ) -> Layout:
        """See Method."""
        assert self._writer is not None, "layouts are made by a bound method"
        if prompt_name == "document":
            return layouts.OwnTokens(tokenizer, prompt, max_length, method=self.name)
        return layouts.WrittenAnswers(
            tokenizer, prompt, max_length, self._writer, self._settings.answers
        )

    def identity(self) -> dict[str, Any]:
        """See Method."""
        return {**super().identity(), "hyde": asdict(self._settings)}


class LLM2VecGen(Method):
    """llm2vec-gen: special tokens after the text, pooled through the adapter's projections."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__(LLM2VEC_GEN)
        self.adapter = adapter
        self.prompts = adapter.prompts
        self.max_length = adapter.max_length
        self.dimension = adapter.dimension
        self._first_id = 0  # of the special tokens: the backbone's vocabulary, once it is bound

    def check_backbone(self, fingerprint: Fingerprint) -> None:
        """See Method."""
        self.adapter.check_backbone(fingerprint)

    def bound(self, backbone: Backbone, tokenizer: Tokenizer, source: Path) -> Self:
        """See Method."""
        self.check_backbone(backbone.fingerprint)
        method = copy.copy(self)
        method._first_id = backbone.config.vocab_size
        method.special = self.adapter.special.to(backbone.device, backbone.dtype)
        projection = self.adapter.projection()
        if projection is not None:
            weight, bias = (tensor.to(backbone.device, torch.float32) for tensor in projection)
            method.projection = pack(weight), bias
        return method

    def layout(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, prompt_name: str | None
    ) -> Layout:
        """See Method."""
        return layouts.SpecialTokens(
            tokenizer,
            prompt,
            max_length,
            self._first_id,
            self.adapter.n_special,
            self.adapter.n_compression,
        )

    def identity(self) -> dict[str, Any]:
        """See Method."""
        return {"adapter": self.adapter.weights_hash(), "max_length": self.max_length}

    def sentence_modules(self, tokenizer: Tokenizer, prompts: Mapping[str, str]) -> SentenceModules:
        """See Method. The special tokens are appended, and the compression tokens alone count."""
        n_thought = self.adapter.n_special - self.adapter.n_compression
        names = [f"<|thought_{i}|>" for i in range(n_thought)]
        names += [f"<|compression_{i}|>" for i in range(self.adapter.n_compression)]
        return SentenceModules(
            Pooling("mean"),
            appended=dict(zip(names, self.adapter.special, strict=True)),
            word_weights=dict.fromkeys(names[n_thought:], 1.0),
            default_weight=0.0,
            projection=self.adapter.projection(),
        )


class SentenceTransformers(Method):
    """sentence-transformers: what a directory in that layout says."""

    def __init__(self, model: SentenceModel) -> None:
        super().__init__(SENTENCE_TRANSFORMERS)
        self._model = model
        self._modules = model.modules
        self.prompts = model.prompts
        self.default_prompt_name = model.default_prompt_name
        self.similarity_fn_name = model.similarity_fn_name
        self.max_length = model.max_length
        self.dimension = model.dimension
        self.full_dimension = model.full_dimension

    def prepare(self, tokenizer: Tokenizer) -> None:
        """See Method."""
        self._model.check_prompts(special_tokens(tokenizer.core))
        if self._model.do_lower_case:
            lower_case(tokenizer.core)

    def bound(self, backbone: Backbone, tokenizer: Tokenizer, source: Path) -> Self:
        """See Method."""
        method = copy.copy(self)
        method._modules = tuple(module.to(backbone.device) for module in self._modules)
        return method

    def layout(
        self, tokenizer: Tokenizer, prompt: str, max_length: int, prompt_name: str | None
    ) -> Layout:
        """See Method."""
        return layouts.WholeText(tokenizer, prompt, max_length, self._model.pooling)

    def row_weights(self, needed: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """See Method."""
        mode = self._model.pooling.mode
        if mode == "mean_sqrt_len_tokens":
            return np.repeat(1 / np.sqrt(needed), needed).astype(np.float32)
        # Positions count from the beginning of the text, whatever is pooled.
        return position_weights(needed, lengths - needed) if mode == "weightedmean" else None

    def pool(
        self, hidden: Tensor, cu_seqlens: Tensor, row_weights: Tensor | None, backbone: Backbone
    ) -> Tensor:
        """See Method."""
        if self._model.pooling.mode == "max":
            norm, eps = backbone.final_norm.float(), backbone.config.norm_eps
            states = rms_norm(hidden.float(), norm, eps)
            # unsafe: without a look at the values of cu_seqlens, which would stop the host.
            pooled = torch.segment_reduce(states, "max", offsets=cu_seqlens, unsafe=True)
        else:
            pooled = super().pool(hidden, cu_seqlens, row_weights, backbone)
        for module in self._modules:
            pooled = module(pooled)
        return pooled

    def identity(self) -> dict[str, Any]:
        """See Method."""
        return {
            "adapter": None,
            "max_length": self.max_length,
            "full_dimension": self.full_dimension,
            "default_prompt_name": self.default_prompt_name,
            "sentence_model": self._model.identity(),
        }

    def sentence_modules(self, tokenizer: Tokenizer, prompts: Mapping[str, str]) -> SentenceModules:
        """See Method. Raises UnsupportedModelError: there is nothing to export."""
        raise UnsupportedModelError("the model is in sentence-transformers' layout already")


# What needs nothing but a backbone.
TRAINING_FREE: Mapping[str, Callable[[str], Method]] = {
    "mean": OwnTokens,
    "weighted-mean": OwnTokens,
    "last-token": OwnTokens,
    "echo": Echo,
    "hyde": HyDE,
}


def position_weights(needed: np.ndarray, starts: np.ndarray | int = 0) -> np.ndarray:
    """Weights of the pooled rows of each text, float32: proportional to position, their sum 1.

    needed [B]: rows of each text; starts [B]: how many positions come before them.
    """
    bounds = np.concatenate(([0], needed.cumsum()))
    texts = np.repeat(np.arange(len(needed)), needed)
    positions = 1.0 + np.arange(bounds[-1]) - bounds[texts]
    positions += np.broadcast_to(starts, needed.shape)[texts]
    sums = np.bincount(texts, positions, len(needed))
    weights: np.ndarray = positions / sums[texts]
    return weights.astype(np.float32)
