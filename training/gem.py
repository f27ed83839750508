"""GEM: a model that embeds through special tokens and still generates.

Texts as they are, with the causal mask, and texts with special tokens in them, with the GEM mask,
lie in one packed batch: the next token is told in both. From a step on the special tokens behind a
text and behind the same text with tokens missing are drawn together.
Source: GEM, arXiv 2506.04344.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gen_fast.errors import AdapterError, ConfigError, InputError
from gen_fast.formats.gem import SpecialTokens, is_gem, read_special, write_special
from gen_fast.model.backbone import Backbone
from gen_fast.model.full import FullWeights
from gen_fast.model.lora import Lora
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import TextTokenizer, special_tokens
from gen_fast.model.weights import load_head
from gen_fast.training.adapted_task import (
    AdaptedTask,
    Data,
    Parts,
    fingerprint_of,
    read_all_texts,
    split,
)
from gen_fast.training.backbone_pass import TrainedBackbone
from gen_fast.training.contrastive import (
    Match,
    View,
    accumulate_contrastive,
    evaluate_contrastive,
)
from gen_fast.training.data import epoch_places
from gen_fast.training.gem_config import LARGEST_SCALE, GEMConfig
from gen_fast.training.prediction import (
    PredictedText,
    accumulate_prediction,
    evaluate_divergence,
    evaluate_prediction,
)
from gen_fast.training.records import Rejections
from gen_fast.training.special import special_rows
from gen_fast.training.task import Progress
from gen_fast.training.trainer import run
from gen_fast.training.world import World

_DRAWS = 1 << 32  # tells them from those of the order of texts


class GEMParameters(nn.Module):
    """What is trained, float32.

    update: of the linears. special [m, h]: of the special tokens. log_scale: λ.
    """

    def __init__(self, update: Lora | FullWeights, special: Tensor, scale: float) -> None:
        super().__init__()
        self.update = update
        self.special = nn.Parameter(special)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale), device=special.device))


@dataclass(frozen=True)
class GEMExample:
    """A text of a step: how its tokens are told, and its two views. step: counted from 0."""

    text: PredictedText
    match: Match
    step: int


def plain(ids: np.ndarray, key: int) -> PredictedText:
    """A text as it is: every token but the first is told."""
    places = np.arange(1, len(ids))
    return PredictedText(ids, places, ids[places], key, (0, 0), is_plain=True)


def masked(
    prefix: np.ndarray, suffix: np.ndarray, special: np.ndarray, key: int, *, whole: bool = True
) -> PredictedText:
    """Special tokens between a prefix and a suffix, of which every token but the first is told.

    special [m]: their ids. whole: False leaves out the tokens of the prefix.
    """
    ids = np.concatenate((prefix, special, suffix))
    first, after = len(prefix), len(prefix) + len(special)
    places = np.arange(after + 1, len(ids))
    if whole:
        places = np.concatenate((np.arange(1, first), places))
    return PredictedText(ids, places, ids[places], key, (first, after))


def drop_tokens(
    ids: np.ndarray, rate: float, kept: np.ndarray, draws: np.random.Generator
) -> np.ndarray:
    """A text without some of its tokens, at least one of its own left; `kept` ids always stay."""
    own = np.flatnonzero(~np.isin(ids, kept))
    dropped = own[draws.random(len(own)) < rate]
    if len(dropped) == len(own) and len(own):
        dropped = np.delete(dropped, draws.integers(len(own)))
    return np.delete(ids, dropped)


class GEMTask(AdaptedTask):
    """Next tokens of plain texts and across special tokens, and the contrastive loss."""

    TAG: ClassVar[str] = "gem"
    config: GEMConfig
    parameters: GEMParameters

    def __init__(
        self,
        backbone: Backbone,
        head: Tensor,
        config: GEMConfig,
        rejections: Rejections,
        data: Data,
        kept: np.ndarray,
    ) -> None:
        """kept: ids that no view of a text lacks."""
        super().__init__(backbone, config, rejections, data)
        generator = torch.Generator().manual_seed(config.seed)
        special = special_rows(
            backbone.embedding, config.n_special, config.special_init, generator
        ).to(backbone.device)
        self.parameters = GEMParameters(self.linears.update, special, config.contrastive_scale)
        self._head = head
        self._kept = kept
        vocabulary = backbone.config.vocab_size
        self._special_ids = np.arange(vocabulary, vocabulary + config.n_special, dtype=np.int32)
        self._trained = TrainedBackbone(
            backbone,
            self.linears.update,
            mask="gem",
            special=self.parameters.special,
            recompute=config.recompute,
        )

    @classmethod
    def load(cls, config: GEMConfig) -> "GEMTask":
        """The task with its data and backbone. Raises ConfigError, InputError, and as `resolve`."""
        parts = Parts.load(config)
        tokenizer = parts.tokenizer
        head = load_head(parts.source, parts.backbone)
        room = config.max_length - config.n_special
        longest = config.max_length + (room if config.form == "reconstruct" else 0)
        if longest > parts.backbone.config.max_positions:
            raise ConfigError(
                f"max_length {config.max_length} gives sequences of {longest} tokens, the model "
                f"was made for {parts.backbone.config.max_positions}"
            )
        ids, texts = read_all_texts(config, parts.rejections)
        rows, _ = TextTokenizer(tokenizer, "", room)(texts)
        usable = [i for i, row in enumerate(rows) if len(row) > 1]
        for i in sorted({*range(len(rows))} - {*usable}):
            parts.rejections.add(ids[i], "fewer than two tokens")
        if not usable:
            raise InputError(f"{', '.join(config.texts)}: no text of two tokens")
        train, validation = (
            [rows[usable[i]] for i in places]
            for places in split([ids[i] for i in usable], config.validation_rows)
        )
        if config.alpha and config.batch_size > len(train):
            raise ConfigError(
                f"a batch of {config.batch_size} of {len(train)} rows would have some twice, as "
                "each other's negatives: lower batch_size"
            )
        data = Data(train, validation, fingerprint_of([*train, *validation]))
        kept = [tokenizer.core.token_to_id(name) for name in special_tokens(tokenizer.core)]
        return cls(parts.backbone, head, config, parts.rejections, data, np.array(kept))

    @property
    def title(self) -> str:
        """See AdaptedTask."""
        what = "" if self.config.trains_lora else ", all linear weights"
        return f"GEM, {self.config.n_special} special tokens, {self.config.form}{what}"

    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """See Task."""
        rate = self.config.learning_rate
        return [
            ([*self.linears.update.parameters(), self.parameters.log_scale], rate),
            ([self.parameters.special], self.config.special_learning_rate or rate),
        ]

    def rate_scale(self, step: int) -> float:
        """See Task."""
        later = self.config.contrastive_learning_rate
        if later is None or step < self.config.alpha_start_step:
            return 1.0
        return later / self.config.learning_rate

    @torch.no_grad()
    def constrain(self) -> None:
        """See Task. The scale of the cosines stays in [1, 100]. Source: CLIP, arXiv 2103.00020."""
        self.parameters.log_scale.clamp_(0.0, math.log(LARGEST_SCALE))

    def begin(self) -> None:
        """See Task."""
        super().begin()
        if self.config.lora_start and is_gem(resolve(self.config.lora_start)):
            self._take(read_special(resolve(self.config.lora_start)))

    def save(self, folder: Path) -> None:
        """See Task."""
        own = self.parameters
        tokens = SpecialTokens(own.special, float(own.log_scale.detach()), self.config.encoding)
        super().save(folder)
        write_special(folder, tokens)

    def restore(self, folder: Path) -> None:
        """See Task."""
        super().restore(folder)
        self._take(read_special(folder))

    @torch.no_grad()
    def _take(self, tokens: SpecialTokens) -> None:
        own = self.parameters
        if tokens.special.shape != own.special.shape:
            raise AdapterError(
                f"special tokens {list(tokens.special.shape)} do not fit this run's "
                f"{list(own.special.shape)}"
            )
        own.special.copy_(tokens.special)
        own.log_scale.fill_(tokens.log_scale)

    def _parts_of(self, ids: np.ndarray, draws: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Prefix and suffix, neither empty."""
        if self.config.form == "reconstruct":
            return ids, ids
        at = int(draws.integers(1, len(ids)))
        return ids[:at], ids[at:]

    def _example(self, ids: np.ndarray, step: int, number: int) -> GEMExample:
        """number: of the example in the run, from which all that is drawn follows."""
        draws = np.random.default_rng([self.config.seed, _DRAWS, 1, number])
        is_plain = draws.random() < self.config.plain_probability
        prefix, suffix = self._parts_of(ids, draws)
        text = (
            plain(ids, 3 * number)
            if is_plain
            else masked(prefix, suffix, self._special_ids, 3 * number)
        )
        return GEMExample(text, self._match(prefix, draws, 3 * number), step)

    def _match(self, prefix: np.ndarray, draws: np.random.Generator, key: int) -> Match:
        """A text, and the same text with tokens missing, each with the special tokens behind it."""
        missing = drop_tokens(prefix, self.config.drop_rate, self._kept, draws)
        return Match(self._view(prefix, key + 1), self._view(missing, key + 2))

    def _view(self, ids: np.ndarray, key: int) -> View:
        m = self.config.n_special
        block = len(ids), len(ids) + m
        return View(np.concatenate((ids, self._special_ids)), m, key, block)

    def examples(self, step: int, world: World) -> Sequence[GEMExample]:
        """See Task."""
        size = self.config.batch_size
        rows = epoch_places(len(self._data.train), self.config.seed, step, size)
        examples = [
            self._example(self._data.train[row], step, step * size + i)
            for i, row in enumerate(rows)
        ]
        alpha = self.config.alpha_at(step)
        return world.share(examples, [self._tokens(example, alpha) for example in examples])

    def _tells(self, alpha: float) -> bool:
        """Whether tokens of texts are told in a step."""
        return alpha < 1 or self.config.base_weight > 0

    def _tokens(self, example: GEMExample, alpha: float) -> int:
        """That are run of an example."""
        told = len(example.text.ids) if self._tells(alpha) else 0
        return told + (example.match.tokens if alpha else 0)

    def accumulate(self, examples: Sequence[GEMExample], world: World) -> Progress:
        """See Task."""
        config = self.config
        self.parameters.zero_grad()
        alpha = config.alpha_at(examples[0].step)
        shares: dict[str, Tensor] = {}
        predicted = 0
        if self._tells(alpha):
            texts = [example.text for example in examples]
            predicted = sum(len(text.places) for text in texts)
            kept = sum(len(text.places) for text in texts if text.is_plain)
            shares["next_token"], divergence = accumulate_prediction(
                self._trained,
                self._head,
                texts,
                max(1, sum(world.counts(predicted))),
                seed=config.seed,
                part_tokens=config.micro_batch_tokens,
                weight=1 - alpha,
                base_weight=config.base_weight,
                plain_tokens=sum(world.counts(kept)),
            )
            if config.base_weight:
                shares["base"] = divergence
        if alpha > 0:
            shares["contrastive"] = accumulate_contrastive(
                self._trained,
                [example.match for example in examples],
                world,
                scale=self.parameters.log_scale.exp(),
                seed=config.seed,
                part_tokens=config.micro_batch_tokens,
                pooling=config.pooling,
                weight=alpha,
            )
        sums = world.sum_gradients(
            list(self.parameters.parameters()), torch.stack(list(shares.values()))
        )
        losses = dict(zip(shares, sums.tolist(), strict=True))
        tokens = sum(self._tokens(example, alpha) for example in examples)
        total = _weighted(alpha, losses.get("next_token", 0.0), losses.get("contrastive", 0.0))
        total += config.base_weight * losses.get("base", 0.0)
        return Progress({"total": total, **losses}, tokens, self._flops(tokens, predicted))

    def validate(self) -> Mapping[str, float]:
        """See Task.

        next_token: of the texts as they are, the causal mask and no special token, and base: how
        far the model has moved from its base there, KL(base‖model) a token; suffix: of the tokens
        behind the special tokens; contrastive, and how often a text's other view is the nearest.
        loss: these as training weighs them in the end.
        """
        config, rows = self.config, self._data.validation
        if not rows:
            return {}
        limit = config.micro_batch_tokens
        suffixes, matches = [], []
        for i, ids in enumerate(rows):
            draws = np.random.default_rng([config.seed, _DRAWS, 2, i])
            prefix, suffix = self._parts_of(ids, draws)
            suffixes.append(masked(prefix, suffix, self._special_ids, 3 * i, whole=False))
            matches.append(self._match(prefix, draws, 3 * i))
        plain_texts = [plain(ids, 3 * i) for i, ids in enumerate(rows)]
        told = evaluate_prediction(self._trained, self._head, plain_texts, limit)
        behind = evaluate_prediction(self._trained, self._head, suffixes, limit)
        kept = evaluate_divergence(self._trained, self._head, plain_texts, limit)
        figures = {"next_token": told["loss"], "base": kept}
        if behind:
            figures |= {"suffix": behind["loss"], "suffix_accuracy": behind["accuracy"]}
        apart = evaluate_contrastive(
            self._trained,
            matches,
            scale=float(self.parameters.log_scale.detach().exp()),
            seed=None,
            part_tokens=limit,
            pooling=config.pooling,
        )
        figures |= {"contrastive": apart.pop("loss"), **apart}
        share = config.plain_probability if behind else 1.0
        next_token = share * told["loss"] + (1 - share) * behind.get("loss", 0.0)
        loss = _weighted(config.alpha, next_token, figures["contrastive"])
        return {"loss": loss + config.base_weight * kept, **figures}


def _weighted(alpha: float, next_token: float, contrastive: float) -> float:
    return (1 - alpha) * next_token + alpha * contrastive


def train(config: GEMConfig, *, show_progress_bar: bool | None = None) -> Path:
    """Train; return the directory of the model, <out>/adapter. See trainer.run."""
    return run(config, lambda: GEMTask.load(config), show_progress_bar=show_progress_bar)
