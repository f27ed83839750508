"""Masked next-token prediction: blocks of running text, and which tokens are hidden.

Source: LLM2Vec, arXiv 2404.05961, §2.2 and appendix D.1.1.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from gen_fast.errors import ConfigError
from gen_fast.model.backbone import Backbone
from gen_fast.model.tokenizing import TextTokenizer, special_tokens
from gen_fast.model.weights import load_head
from gen_fast.training.adapted_task import Data, fingerprint_of, read_all_texts, split
from gen_fast.training.data import epoch_places
from gen_fast.training.llm2vec_config import LLM2VecConfig
from gen_fast.training.llm2vec_task import LLM2VecTask, load_parts
from gen_fast.training.prediction import (
    PredictedText,
    accumulate_prediction,
    evaluate_prediction,
)
from gen_fast.training.records import Rejections
from gen_fast.training.task import Progress
from gen_fast.training.world import World

# Of the tokens that are chosen: become the mask token, another token; the rest stays.
BERT = (0.8, 0.1)
_MASKS = 1 << 31  # tells their draws from those of the order of texts


def blocks(rows: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Texts one after another, cut into blocks of `length` tokens; the rest is left out."""
    running = np.concatenate(rows) if len(rows) else np.empty(0, dtype=np.int32)
    return list(running[: len(running) // length * length].reshape(-1, length))


def hide(
    ids: np.ndarray,
    *,
    key: int,
    probability: float,
    masking: str,
    mask_id: int,
    vocabulary: int,
    special: np.ndarray,
    draws: np.random.Generator,
) -> PredictedText:
    """Hide each token of a text with `probability`; special ids are never hidden.

    masking: "bert" makes 80% of the hidden tokens the mask token, 10% one of the vocabulary's, and
    leaves 10%; "always" makes all of them the mask token. The first token may be hidden, but no
    position comes before it that could tell it.
    """
    chosen = (draws.random(len(ids)) < probability) & ~np.isin(ids, special)
    read = ids.copy()
    if masking == "always":
        read[chosen] = mask_id
    else:
        kind = draws.random(len(ids))
        read[chosen & (kind < BERT[0])] = mask_id
        replaced = chosen & (kind >= BERT[0]) & (kind < sum(BERT))
        read[replaced] = draws.integers(0, vocabulary, replaced.sum())
    places = np.flatnonzero(chosen[1:]) + 1
    return PredictedText(read, places, ids[places], key)


class MNTPTask(LLM2VecTask):
    """Masked next-token prediction over blocks of running text."""

    def __init__(
        self,
        backbone: Backbone,
        head: Tensor,
        config: LLM2VecConfig,
        rejections: Rejections,
        data: Data,
        mask_id: int,
        special: np.ndarray,
    ) -> None:
        super().__init__(backbone, config, rejections, data)
        self._head = head
        self._mask_id = mask_id
        self._special = special

    @classmethod
    def load(cls, config: LLM2VecConfig) -> "MNTPTask":
        """The task with its data and backbone. Raises ConfigError, InputError, and as `resolve`."""
        parts = load_parts(config)
        tokenizer = parts.tokenizer
        head = load_head(parts.source, parts.backbone)
        mask_id = tokenizer.core.token_to_id(config.mask_token)
        if mask_id is None:
            raise ConfigError(f"the vocabulary has no mask_token {config.mask_token!r}")
        special = [tokenizer.core.token_to_id(name) for name in special_tokens(tokenizer.core)]
        ids, texts = read_all_texts(config, parts.rejections)
        whole = TextTokenizer(tokenizer, "", 1 << 40)
        rows, _ = whole(texts)
        assert config.max_length is not None
        train, validation = (
            blocks([rows[i] for i in places], config.max_length)
            for places in split(ids, config.validation_rows)
        )
        if not train:
            raise ConfigError(f"the texts have fewer than max_length = {config.max_length} tokens")
        data = Data(train, validation, fingerprint_of([*train, *validation]))
        return cls(parts.backbone, head, config, parts.rejections, data, mask_id, np.array(special))

    def _hidden(self, block: np.ndarray, key: int, *seeds: int) -> PredictedText:
        return hide(
            block,
            key=key,
            probability=self.config.mask_probability,
            masking=self.config.masking,
            mask_id=self._mask_id,
            vocabulary=self.backbone.config.vocab_size,
            special=self._special,
            draws=np.random.default_rng([self.config.seed, _MASKS, *seeds]),
        )

    def examples(self, step: int, world: World) -> Sequence[PredictedText]:
        """See Task."""
        size = self.config.batch_size
        rows = epoch_places(len(self._data.train), self.config.seed, step, size)
        texts = [
            self._hidden(self._data.train[row], step * size + i, 1, step * size + i)
            for i, row in enumerate(rows)
        ]
        return world.share(texts, [len(text.ids) for text in texts])

    def accumulate(self, examples: Sequence[PredictedText], world: World) -> Progress:
        """See Task."""
        self.parameters.zero_grad()
        own = sum(len(text.places) for text in examples)
        shares = accumulate_prediction(
            self._trained,
            self._head,
            examples,
            max(1, sum(world.counts(own))),
            seed=self.config.seed,
            part_tokens=self.config.micro_batch_tokens,
        )
        tokens = sum(len(text.ids) for text in examples)
        return Progress(self._summed(shares[0], world), tokens, self._flops(tokens, own))

    def validate(self) -> Mapping[str, float]:
        """See Task. Cross-entropy of the hidden tokens, and how many are the likeliest ones."""
        texts = [self._hidden(block, i, 2, i) for i, block in enumerate(self._data.validation)]
        limit = self.config.micro_batch_tokens
        return evaluate_prediction(self._trained, self._head, texts, limit)
