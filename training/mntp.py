"""Masked next-token prediction: blocks of running text, masks, and the loss.

Source: LLM2Vec, arXiv 2404.05961, §2.2 and appendix D.1.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen_fast.errors import ConfigError
from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import on_device
from gen_fast.model.lora import Lora
from gen_fast.model.tokenizing import TextTokenizer, special_tokens
from gen_fast.model.weights import load_head
from gen_fast.ops.distill import reconstruction
from gen_fast.training.backbone_pass import TrainedBackbone
from gen_fast.training.data import epoch_places
from gen_fast.training.llm2vec_config import LLM2VecConfig
from gen_fast.training.lora_task import (
    Data,
    LoraTask,
    Parts,
    fingerprint_of,
    read_all_texts,
    split,
)
from gen_fast.training.records import Rejections
from gen_fast.training.task import Progress, add_gradients, in_parts
from gen_fast.training.world import World

# Of the tokens that are chosen: become the mask token, another token; the rest stays.
BERT = (0.8, 0.1)
_MASKS = 1 << 31  # tells their draws from those of the order of texts


@dataclass(frozen=True)
class MaskedText:
    """A text with some tokens hidden.

    ids [n]: what the model reads. places [m]: of the tokens it has to tell, never 0. targets [m]:
    those tokens. key: tells its dropout from that of the other texts of a step.
    """

    ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    key: int


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
) -> MaskedText:
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
    return MaskedText(read, places, ids[places], key)


def mntp_states(
    trained: TrainedBackbone, lora: Lora, texts: Sequence[MaskedText], seed: int | None
) -> tuple[Tensor, Tensor]:
    """Final-norm states [N, h] at the rows before the hidden tokens, and those tokens [N].

    seed: of the step's dropout; None for none.
    """
    states = trained.states([t.ids for t in texts], [t.key for t in texts], lora, seed)
    starts = np.cumsum([0, *(len(text.ids) for text in texts)])
    rows = [start + text.places - 1 for start, text in zip(starts, texts, strict=False)]
    device = states.device
    targets = np.concatenate([text.targets for text in texts]).astype(np.int64)
    return states[on_device(np.concatenate(rows), device)], on_device(targets, device)


def mntp_loss(states: Tensor, head: Tensor, targets: Tensor, tokens: int) -> Tensor:
    """Cross-entropy summed over the hidden tokens, divided by `tokens`."""
    if not len(targets):
        return states.sum() * 0
    loss: Tensor = reconstruction(states, head, targets, tokens=tokens)
    return loss


@torch.no_grad()
def right(states: Tensor, head: Tensor, targets: Tensor) -> int:
    """How many of the hidden tokens are the likeliest ones."""
    parts = zip(states.split(256), targets.split(256), strict=True)
    return sum(int(((part @ head.T).argmax(-1) == wanted).sum()) for part, wanted in parts)


class MNTPTask(LoraTask):
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
        parts = Parts.load(config)
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

    def _hidden(self, block: np.ndarray, key: int, *seeds: int) -> MaskedText:
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

    def examples(self, step: int, world: World) -> Sequence[MaskedText]:
        """See Task."""
        size = self.config.batch_size
        rows = epoch_places(len(self._data.train), self.config.seed, step, size)
        texts = [
            self._hidden(self._data.train[row], step * size + i, 1, step * size + i)
            for i, row in enumerate(rows)
        ]
        return world.share(texts, [len(text.ids) for text in texts])

    def accumulate(self, examples: Sequence[MaskedText], world: World) -> Progress:
        """See Task."""
        self.parameters.zero_grad()
        own = sum(len(text.places) for text in examples)
        tokens = max(1, sum(world.counts(own)))
        parameters = list(self.parameters.parameters())

        def backward(part: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
            states, targets = mntp_states(
                self._trained, self.parameters, examples[part], self.config.seed
            )
            loss = mntp_loss(states, self._head, targets, tokens)
            return loss.detach(), torch.autograd.grad(loss, parameters)

        lengths = [len(text.ids) for text in examples]
        total = torch.zeros((), device=self.backbone.device)
        budget = self._trained.budget
        for loss, gradients in in_parts(lengths, budget, self.config.micro_batch_tokens, backward):
            total += loss
            add_gradients(parameters, gradients)
        return Progress(self._summed(total, world), sum(lengths), self._flops(sum(lengths), own))

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """See Task. Cross-entropy of the hidden tokens, and how many are the likeliest ones."""
        texts = [self._hidden(block, i, 2, i) for i, block in enumerate(self._data.validation)]
        texts = [text for text in texts if len(text.places)]
        if not texts:
            return {}
        loss, correct, tokens = 0.0, 0, sum(len(text.places) for text in texts)

        def score(part: slice) -> tuple[float, int]:
            states, targets = mntp_states(self._trained, self.parameters, texts[part], None)
            value = mntp_loss(states, self._head, targets, tokens)
            return float(value), right(states, self._head, targets)

        lengths = [len(text.ids) for text in texts]
        limit = self.config.micro_batch_tokens
        for value, count in in_parts(lengths, self._trained.budget, limit, score):
            loss += value
            correct += count
        return {"loss": loss, "accuracy": correct / tokens}
