"""LLM2Vec as tasks of the trainer: masked next-token prediction, SimCSE and the supervised step.

Each trains LoRA factors over a frozen backbone that attends to all tokens, and leaves an adapter as
PEFT writes it. A step goes on from another's result by naming it as its backbone.
Source: LLM2Vec, arXiv 2404.05961.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from gen_fast.embed.llm2vec import InstructedText
from gen_fast.errors import ConfigError, InputError
from gen_fast.formats.llm2vec import Settings, Wrapper, read_checkpoint, write_settings
from gen_fast.formats.peft import read_adapter, write_adapter
from gen_fast.io.text_files import read_texts
from gen_fast.model.backbone import Backbone
from gen_fast.model.device import resolve_dtype
from gen_fast.model.lora import Lora, LoraConfig
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import TextTokenizer, Tokenizer, load_tokenizer, special_tokens
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.training.backbone_pass import TrainedBackbone
from gen_fast.training.choices import STEPS
from gen_fast.training.config import RunConfig
from gen_fast.training.contrastive import Match, View, accumulate_contrastive, embed, infonce
from gen_fast.training.data import read_rows, smallest_hashes
from gen_fast.training.mntp import MaskedText, blocks, hide, mntp_loss, mntp_states, right
from gen_fast.training.records import Rejections
from gen_fast.training.report import draw_curves, summary
from gen_fast.training.task import Progress, Task, add_gradients, in_parts
from gen_fast.training.trainer import run, run_device
from gen_fast.training.world import World

# What each step takes where nothing is given: batch, tokens of a text, learning rate, warm-up,
# attention dropout, scale of the cosines. Source: the paper, appendix D, and the settings that
# come with its code.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mntp": {
        "batch_size": 32,
        "max_length": 512,
        "learning_rate": 5e-5,
        "warmup_steps": 0,
        "attention_dropout": 0.0,
        "contrastive_scale": 20.0,
    },
    "simcse": {
        "batch_size": 128,
        "max_length": 128,
        "learning_rate": 3e-5,
        "warmup_steps": 0,
        "attention_dropout": 0.3,
        "contrastive_scale": 20.0,
    },
    "supervised": {
        "batch_size": 512,
        "max_length": 512,
        "learning_rate": 2e-4,
        "warmup_steps": 300,
        "attention_dropout": 0.0,
        "contrastive_scale": 50.0,
    },
}


@dataclass(frozen=True)
class LLM2VecConfig(RunConfig):
    """Settings of one step of LLM2Vec. What is None is taken from DEFAULTS.

    step: "mntp", "simcse" or "supervised". texts: files; for the first two of texts (txt, jsonl,
    csv, parquet, with text_column and perhaps id_column), for the last jsonl files of {"id",
    "query", "answer"} and perhaps {"negative_answer"}: in all rows, or in none.
    query_prompt: put before queries of the supervised step, attended to and not pooled.
    max_length: tokens of a text, or of a block of running text.
    mask: of attention, "bidirectional", or "causal" for comparisons. mask_probability, masking
    ("bert" or "always"), mask_token: see mntp.hide.
    lora_rank, lora_alpha, lora_dropout: see LoraConfig. lora_start: an adapter whose factors are
    gone on with, over the same backbone; by default they begin anew.
    attention_dropout: of attention's weights. contrastive_scale: of the cosines in InfoNCE.
    recompute: run layers again in the backward pass, which takes less memory and more time.
    """

    step: str = ""
    texts: tuple[str, ...] = ()
    text_column: str | None = None
    id_column: str | None = None
    query_prompt: str = ""
    max_length: int | None = None
    mask: str = "bidirectional"
    mask_probability: float = 0.2
    masking: str = "bert"
    mask_token: str = "_"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_start: str = ""
    attention_dropout: float | None = None
    contrastive_scale: float | None = None
    recompute: bool = False
    batch_size: int = None  # type: ignore[assignment]
    warmup_steps: int = None  # type: ignore[assignment]
    steps: int = 1000

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "step": STEPS,
        "mask": ("bidirectional", "causal"),
        "masking": ("bert", "always"),
    }
    REQUIRED = ("step", "texts", "out")
    POSITIVE = ("max_length", "contrastive_scale", "mask_probability", *RunConfig.POSITIVE)

    def __post_init__(self) -> None:
        for name, value in DEFAULTS.get(self.step, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()
        for name in ("attention_dropout", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.mask_probability > 1:
            raise ConfigError(f"mask_probability must be at most 1, not {self.mask_probability}")
        if self.step == "simcse" and not self.attention_dropout and not self.lora_dropout:
            raise ConfigError("simcse without dropout shows the same text twice: nothing is learnt")

    @property
    def encoding(self) -> Settings:
        """How texts are embedded with what is trained: whole, the mean over their own tokens."""
        assert self.max_length is not None
        length = self.max_length if self.step != "mntp" else 512
        return Settings("mean", length, doc_max_length=None)

    @property
    def lora(self) -> LoraConfig:
        """Sizes of the adapter."""
        return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout)


def train(config: LLM2VecConfig, *, show_progress_bar: bool | None = None) -> Path:
    """Train one step; return its adapter's directory, <out>/adapter. See trainer.run."""
    task = MNTPTask if config.step == "mntp" else ContrastiveTask
    return run(config, lambda: task.load(config), show_progress_bar=show_progress_bar)


class _LLM2VecTask(Task[Any]):
    """What the steps have in common: the factors, and the files they are written to."""

    config: LLM2VecConfig
    parameters: Lora

    def __init__(
        self,
        backbone: Backbone,
        config: LLM2VecConfig,
        rejections: Rejections,
        data: "Data",
    ) -> None:
        self.backbone = backbone
        self.config = config
        self.rejections = rejections
        self.parameters = Lora(config.lora, backbone.config, seed=config.seed).to(backbone.device)
        self._data = data
        self._trained = TrainedBackbone(
            backbone,
            mask=config.mask,
            attention_dropout=config.attention_dropout or 0.0,
            recompute=config.recompute,
        )

    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """See Task."""
        assert self.config.learning_rate is not None
        return [(list(self.parameters.parameters()), self.config.learning_rate)]

    def identity(self) -> dict[str, Any]:
        """See Task."""
        return {"data": self._data.fingerprint}

    def begin(self) -> None:
        """See Task."""
        if self.config.lora_start:
            self.restore(Path(self.config.lora_start))

    def save(self, folder: Path) -> None:
        """See Task."""
        config = self.config
        write_adapter(
            folder,
            self.parameters.weights(),
            base=config.backbone,
            revision=config.backbone_revision,
            fingerprint=self.backbone.fingerprint,
            tags=("llm2vec",),
        )

    def restore(self, folder: Path) -> None:
        """See Task."""
        self.parameters.copy_factors(read_adapter(folder).weights.factors)

    def finish(self, folder: Path, step: int) -> None:
        """See Task."""
        config, out = self.config, folder.parent
        self.save(folder)
        if config.mask == "bidirectional":
            write_settings(folder, config.encoding)
        curves = [("loss", ("loss/total", "validation/loss"), "nats")]
        others = [n for n, _ in summary(out) if n != "validation/loss"]
        draw_curves(out, folder / "curves.png", [*curves, ("validation", others, "")])
        figures = "\n".join(f"- {n.split('/')[1]}: {value:.4f}" for n, value in summary(out))
        card = (folder / "README.md").read_text()
        card += f"""
LLM2Vec, {config.step}: {step} steps of {config.batch_size} texts with gen_fast; settings in
`training.yaml`. On held-out rows:

{figures}

![curves](curves.png)
"""
        (folder / "README.md").write_text(card)
        (folder / "training.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False))

    def _flops(self, tokens: int, predicted: int = 0) -> float:
        """2 for each weight and token forward and as many back; the head twice."""
        head = self.backbone.embedding.numel()
        return 4.0 * (self.backbone.config.non_embedding_parameters * tokens + head * predicted)

    def _summed(self, loss: Tensor, world: World) -> dict[str, float]:
        """Sum gradients and this rank's share of the loss over the ranks."""
        parameters = list(self.parameters.parameters())
        total = float(world.sum_gradients(parameters, loss.detach().reshape(1))[0])
        return {"total": total, self.config.step: total}


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is held out. fingerprint: of both."""

    train: Sequence[Any]
    validation: Sequence[Any]
    fingerprint: str

    def order(self, seed: int, first: int, count: int) -> list[int]:
        """Rows `first` … of epochs of seeded permutations, which stand one behind another."""
        n = len(self.train)
        places = np.arange(first, first + count)
        rows: list[int] = []
        for epoch in np.unique(places // n):
            order = np.random.default_rng([seed, int(epoch)]).permutation(n)
            rows += order[places[places // n == epoch] % n].tolist()
        return rows


def _load(config: LLM2VecConfig) -> tuple[Backbone, Tensor, Tokenizer, Rejections]:
    device = run_device(config)
    directory = resolve(config.backbone, config.backbone_revision)
    below = read_checkpoint(directory, config.backbone)
    tokenizer = load_tokenizer(below.tokenizer)
    dtype = resolve_dtype(config.dtype, device)
    backbone = load_backbone(
        below.source,
        dtype=dtype,
        device=device,
        adapters=below.adapters,
        bidirectional=config.mask == "bidirectional",
    )
    rejections = Rejections(Path(config.out) / "rejected.jsonl")
    return backbone, load_head(below.source, backbone), tokenizer, rejections


def _read_texts(config: LLM2VecConfig, rejections: Rejections) -> tuple[list[str], list[str]]:
    """Ids and texts of all files; empty texts are left out and counted."""
    ids: list[str] = []
    texts: list[str] = []
    for number, source in enumerate(config.texts):
        read = read_texts(source, text_column=config.text_column, id_column=config.id_column)
        for identifier, text in zip(read.ids, read.texts, strict=True):
            name = f"{number}:{identifier}" if len(config.texts) > 1 else identifier
            if text.strip():
                ids.append(name)
                texts.append(text.strip())
            else:
                rejections.add(name, "empty text")
    if not texts:
        raise InputError(f"{', '.join(config.texts)}: no usable text")
    return ids, texts


def _split(ids: Sequence[str], held_out: int) -> tuple[list[int], list[int]]:
    """Places to train on, and places that are held out. Raises ConfigError if none is left."""
    held = smallest_hashes(ids, held_out)
    train = [i for i, identifier in enumerate(ids) if identifier not in held]
    if not train:
        raise ConfigError(f"{len(ids)} rows, of which {held_out} for validation: none is left")
    return train, [i for i, identifier in enumerate(ids) if identifier in held]


def _fingerprint(rows: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + row.astype(np.int32).tobytes())
    return digest.hexdigest()


class MNTPTask(_LLM2VecTask):
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
        backbone, head, tokenizer, rejections = _load(config)
        mask_id = tokenizer.core.token_to_id(config.mask_token)
        if mask_id is None:
            raise ConfigError(f"the vocabulary has no mask_token {config.mask_token!r}")
        special = [tokenizer.core.token_to_id(name) for name in special_tokens(tokenizer.core)]
        ids, texts = _read_texts(config, rejections)
        whole = TextTokenizer(tokenizer, "", 1 << 40)
        rows, _ = whole(texts)
        assert config.max_length is not None
        train, validation = (
            blocks([rows[i] for i in places], config.max_length)
            for places in _split(ids, config.validation_rows)
        )
        if not train:
            raise ConfigError(f"the texts have fewer than max_length = {config.max_length} tokens")
        data = Data(train, validation, _fingerprint([*train, *validation]))
        return cls(backbone, head, config, rejections, data, mask_id, np.array(special))

    def _hidden(self, block: np.ndarray, key: int, *seeds: int) -> MaskedText:
        return hide(
            block,
            key=key,
            probability=self.config.mask_probability,
            masking=self.config.masking,
            mask_id=self._mask_id,
            vocabulary=self.backbone.config.vocab_size,
            special=self._special,
            draws=np.random.default_rng([self.config.seed, *seeds]),
        )

    def examples(self, step: int, world: World) -> Sequence[MaskedText]:
        """See Task."""
        size = self.config.batch_size
        rows = self._data.order(self.config.seed, step * size, size)
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


class ContrastiveTask(_LLM2VecTask):
    """SimCSE, and the supervised step with hard negatives."""

    @classmethod
    def load(cls, config: LLM2VecConfig) -> "ContrastiveTask":
        """The task with its data and backbone. Raises ConfigError, InputError, and as `resolve`."""
        backbone, _, tokenizer, rejections = _load(config)
        read = _simcse if config.step == "simcse" else _supervised
        ids, rows = read(config, tokenizer, rejections)
        train, validation = _split(ids, config.validation_rows)
        fingerprint = _fingerprint([view[0] for row in rows for view in row])
        data = Data([rows[i] for i in train], [rows[i] for i in validation], fingerprint)
        return cls(backbone, config, rejections, data)

    def examples(self, step: int, world: World) -> Sequence[Match]:
        """See Task."""
        size = self.config.batch_size
        rows = self._data.order(self.config.seed, step * size, size)
        matches = [_match(self._data.train[row], step * size + i) for i, row in enumerate(rows)]
        return world.share(matches, [match.tokens for match in matches])

    def accumulate(self, examples: Sequence[Match], world: World) -> Progress:
        """See Task."""
        self.parameters.zero_grad()
        assert self.config.contrastive_scale is not None
        share = accumulate_contrastive(
            self._trained,
            self.parameters,
            examples,
            world,
            scale=self.config.contrastive_scale,
            seed=self.config.seed,
            part_tokens=self.config.micro_batch_tokens,
        )
        tokens = sum(match.tokens for match in examples)
        return Progress(self._summed(share, world), tokens, self._flops(tokens))

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """See Task. InfoNCE and how often the positive is the nearest, all rows in one batch.

        With dropout where the views of a text differ by nothing else.
        """
        matches = [_match(row, i) for i, row in enumerate(self._data.validation)]
        if not matches:
            return {}
        seed = self.config.seed + 1 if self.config.step == "simcse" else None
        rows = {}
        for name in matches[0].views():
            views = [match.views()[name] for match in matches]
            lengths = [len(view.ids) for view in views]

            def run(part: slice, views: list[View] = views) -> Tensor:
                return embed(self._trained, self.parameters, views[part], seed)

            limit = self.config.micro_batch_tokens
            parts = in_parts(lengths, self._trained.budget, limit, run)
            rows[name] = nn.functional.normalize(torch.cat(list(parts)), dim=-1)
        cosines = rows["anchor"] @ rows["positive"].T
        best = cosines.argmax(1) == torch.arange(len(matches), device=cosines.device)
        # Uniformity (Wang & Isola, arXiv 2005.10242): how far all texts are from each other.
        apart = torch.pdist(rows["positive"]).square().mul(-2).exp().mean().log()
        scale = self.config.contrastive_scale or 1.0
        return {
            "loss": float(infonce(rows, scale)),
            "top1": float(best.double().mean()),
            "uniformity": float(apart),
        }


Row = tuple[tuple[np.ndarray, int], ...]
"""(ids, pooled tokens) of an anchor, its positive and perhaps its negative."""


def _match(row: Row, number: int) -> Match:
    return Match(*(View(ids, needed, 3 * number + i) for i, (ids, needed) in enumerate(row)))


def _simcse(
    config: LLM2VecConfig, tokenizer: Tokenizer, rejections: Rejections
) -> tuple[list[str], list[Row]]:
    """Each text twice."""
    ids, texts = _read_texts(config, rejections)
    laid = _laid_out(config, tokenizer, "", texts)
    return ids, [(view, view) for view in laid]


def _supervised(
    config: LLM2VecConfig, tokenizer: Tokenizer, rejections: Rejections
) -> tuple[list[str], list[Row]]:
    """Queries, their answers, and negative answers if all rows have one."""
    rows = read_rows(config.texts, rejections)
    columns = [_laid_out(config, tokenizer, config.query_prompt, [r.query.strip() for r in rows])]
    columns.append(_laid_out(config, tokenizer, "", [r.answer.strip() for r in rows]))
    negatives = [row.negative_answer for row in rows if row.negative_answer is not None]
    if negatives and len(negatives) < len(rows):
        raise InputError(
            f"{len(rows) - len(negatives)} of {len(rows)} rows have no negative_answer: give all "
            "rows one, or none"
        )
    if negatives:
        columns.append(_laid_out(config, tokenizer, "", [text.strip() for text in negatives]))
    return [row.id for row in rows], list(zip(*columns, strict=True))


def _laid_out(
    config: LLM2VecConfig, tokenizer: Tokenizer, prompt: str, texts: Sequence[str]
) -> list[tuple[np.ndarray, int]]:
    """Ids of texts as the encoder runs them, and how many of the last are pooled."""
    assert config.max_length is not None
    layout = InstructedText(tokenizer, prompt, config.max_length, config.encoding, Wrapper())
    sequences = layout(texts, 0)
    return list(zip(sequences.ids, sequences.needed.tolist(), strict=True))
