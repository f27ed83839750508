"""SimCSE and the supervised step: texts drawn together and apart, in batches of any size.

Gradient caching: the embeddings of the whole batch are computed without gradient, the loss gives
the gradient at each, and texts are run again, some at a time, to take it to the parameters. Dropout
is the same in both passes.
Sources: LLM2Vec, arXiv 2404.05961, §2.3; SimCSE, arXiv 2104.08821; Gao et al., arXiv 2101.06983
(gradient caching).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gen_fast.embed.llm2vec import InstructedText
from gen_fast.errors import ConfigError, InputError
from gen_fast.formats.llm2vec import Wrapper
from gen_fast.model.batch import on_device, split_by_budget
from gen_fast.model.tokenizing import Tokenizer
from gen_fast.training.adapted_task import Data, Parts, fingerprint_of, read_all_texts, split
from gen_fast.training.backbone_pass import Block, TrainedBackbone
from gen_fast.training.data import epoch_places, read_rows
from gen_fast.training.llm2vec_config import LLM2VecConfig
from gen_fast.training.llm2vec_task import LLM2VecTask, load_parts
from gen_fast.training.losses import contrastive, over_all_ranks
from gen_fast.training.task import Progress, add_gradients, in_parts
from gen_fast.training.world import World


@dataclass(frozen=True)
class View:
    """A text as it is embedded: ids [n], the last `needed` of which are pooled.

    key: tells its dropout from that of the other views of a step. block: its special tokens, where
    the mask knows such.
    """

    ids: np.ndarray
    needed: int
    key: int
    block: Block | None = None


@dataclass(frozen=True)
class Match:
    """Views that belong together: an anchor, what it should be near to, and perhaps what not."""

    anchor: View
    positive: View
    negative: View | None = None

    def views(self) -> dict[str, View]:
        """By name."""
        named = {"anchor": self.anchor, "positive": self.positive}
        return named if self.negative is None else {**named, "negative": self.negative}

    @property
    def tokens(self) -> int:
        """Of all views."""
        return sum(len(view.ids) for view in self.views().values())


def embed(
    trained: TrainedBackbone, views: Sequence[View], seed: int | None, pooling: str = "mean"
) -> Tensor:
    """Mean of the final-norm states of the pooled tokens: [n, h], float32.

    pooling: "concat" puts them side by side instead, [n, needed · h]; all views need as many.
    """
    needed = [view.needed for view in views]
    states = trained.states(
        [view.ids for view in views],
        [view.key for view in views],
        seed,
        needed,
        [view.block for view in views],
    )
    if pooling == "concat":
        return states.float().reshape(len(views), -1)
    lengths = on_device(np.array(needed), states.device)
    # unsafe: lengths are not read back to be checked, which would stop the host.
    means: Tensor = torch.segment_reduce(
        states.float(), "mean", lengths=lengths, axis=0, unsafe=True
    )
    return means


def infonce(rows: Mapping[str, Tensor], scale: float | Tensor) -> Tensor:
    """InfoNCE of anchors [B, d] against all positives and negatives, by cosine times `scale`."""
    anchors = rows["anchor"]
    return contrastive(anchors, rows["positive"], rows.get("negative", anchors[:0]), scale)


def accumulate_contrastive(
    trained: TrainedBackbone,
    matches: Sequence[Match],
    world: World,
    *,
    scale: float | Tensor,
    seed: int,
    part_tokens: int | None,
    pooling: str = "mean",
    weight: float = 1.0,
) -> Tensor:
    """Add the gradients of weight · InfoNCE of the global batch to what is trained.

    matches: this rank's; all have a negative, or none. scale: of the cosines; a tensor takes its
    gradient to what it was computed from. part_tokens: with gradient at a time; None fits the
    device. pooling: see `embed`. Returns this rank's share of the loss.
    """
    names = list(matches[0].views())
    views = [match.views()[name] for name in names for match in matches]
    lengths = [len(view.ids) for view in views]
    parameters = trained.parameters

    def forward(part: slice) -> Tensor:
        return embed(trained, views[part], seed, pooling)

    budget = trained.budget
    part_size = min(sum(lengths), budget.limit(part_tokens))
    graph = None
    if sum(lengths) <= trained.kept_tokens(part_tokens):  # one pass is enough
        try:
            graph = torch.cat([forward(part) for part in split_by_budget(lengths, part_size)])
        except RuntimeError as error:  # only running out of memory is survived
            budget.shrink(error, part_size, len(lengths))
    embeddings = graph
    if embeddings is None:
        with torch.no_grad():
            embeddings = torch.cat(list(in_parts(lengths, budget, part_tokens, forward)))
    rows = dict(zip(names, embeddings.split(len(matches)), strict=True))
    shares: list[Tensor] = []
    if isinstance(scale, Tensor):
        # Every rank takes the gradient of the whole loss, and they are summed.
        scale.register_hook(lambda gradient: gradient / world.size)

    def loss(everyone: Mapping[str, Tensor]) -> Tensor:
        value = infonce(everyone, scale)
        shares.append(value.detach() / world.size)
        return value * weight

    counts = world.counts(len(matches))
    cached = torch.cat(list(over_all_ranks(rows, counts, world, loss).values()))

    def backward(part: slice) -> tuple[Tensor, ...]:
        # Not backward(): of a part that fails half-way nothing may have been added.
        return torch.autograd.grad(forward(part), parameters, cached[part])

    if graph is not None:
        try:
            add_gradients(parameters, torch.autograd.grad(graph, parameters, cached))
            return shares[0]
        except RuntimeError as error:  # nothing has been added: part by part instead
            budget.shrink(error, part_size, len(lengths))
            del graph, embeddings, rows
    for gradients in in_parts(lengths, budget, part_tokens, backward):
        add_gradients(parameters, gradients)
        del gradients  # before those of the next part are there
    return shares[0]


@torch.no_grad()
def evaluate_contrastive(
    trained: TrainedBackbone,
    matches: Sequence[Match],
    *,
    scale: float,
    seed: int | None,
    part_tokens: int | None,
    pooling: str = "mean",
) -> dict[str, float]:
    """InfoNCE of all as one batch, how often the positive is the nearest, and their uniformity.

    Empty without any. The arguments are those of `accumulate_contrastive`.
    """
    if not matches:
        return {}
    rows = {}
    for name in matches[0].views():
        views = [match.views()[name] for match in matches]
        lengths = [len(view.ids) for view in views]

        def run(part: slice, views: list[View] = views) -> Tensor:
            return embed(trained, views[part], seed, pooling)

        parts = in_parts(lengths, trained.budget, part_tokens, run)
        rows[name] = normalize(torch.cat(list(parts)), dim=-1)
    cosines = rows["anchor"] @ rows["positive"].T
    best = cosines.argmax(1) == torch.arange(len(matches), device=cosines.device)
    figures = {"loss": float(infonce(rows, scale)), "top1": float(best.double().mean())}
    if len(matches) > 1:
        # Uniformity (Wang & Isola, arXiv 2005.10242): how far all texts are from each other.
        apart = torch.pdist(rows["positive"]).square().mul(-2).exp().mean().log()
        figures["uniformity"] = float(apart)
    return figures


class ContrastiveTask(LLM2VecTask):
    """SimCSE, and the supervised step with hard negatives."""

    @classmethod
    def load(cls, config: LLM2VecConfig) -> "ContrastiveTask":
        """The task with its data and backbone. Raises ConfigError, InputError, and as `resolve`."""
        parts = load_parts(config)
        read = _simcse if config.step == "simcse" else _supervised
        ids, rows = read(config, parts)
        train, validation = split(ids, config.validation_rows)
        if config.batch_size > len(train):
            raise ConfigError(
                f"a batch of {config.batch_size} of {len(train)} rows would have some twice, as "
                "each other's negatives: lower batch_size"
            )
        order = [rows[i] for i in (*train, *validation)]
        pooled = [np.array([needed for _, needed in row]) for row in order]
        fingerprint = fingerprint_of([view[0] for row in order for view in row] + pooled)
        data = Data(order[: len(train)], order[len(train) :], fingerprint)
        return cls(parts.backbone, config, parts.rejections, data)

    def examples(self, step: int, world: World) -> Sequence[Match]:
        """See Task."""
        size = self.config.batch_size
        rows = epoch_places(len(self._data.train), self.config.seed, step, size)
        matches = [_match(self._data.train[row], step * size + i) for i, row in enumerate(rows)]
        return world.share(matches, [match.tokens for match in matches])

    def accumulate(self, examples: Sequence[Match], world: World) -> Progress:
        """See Task."""
        self.parameters.zero_grad()
        assert self.config.contrastive_scale is not None
        share = accumulate_contrastive(
            self._trained,
            examples,
            world,
            scale=self.config.contrastive_scale,
            seed=self.config.seed,
            part_tokens=self.config.micro_batch_tokens,
        )
        tokens = sum(match.tokens for match in examples)
        return Progress(self._summed(share, world), tokens, self._flops(tokens))

    def validate(self) -> Mapping[str, float]:
        """See Task. All rows are one batch.

        With dropout where the views of a text differ by nothing else.
        """
        return evaluate_contrastive(
            self._trained,
            [_match(row, i) for i, row in enumerate(self._data.validation)],
            scale=self.config.contrastive_scale or 1.0,
            seed=self.config.seed + 1 if self.config.step == "simcse" else None,
            part_tokens=self.config.micro_batch_tokens,
        )


Row = tuple[tuple[np.ndarray, int], ...]
"""(ids, pooled tokens) of an anchor, its positive and perhaps its negative."""


def _match(row: Row, number: int) -> Match:
    return Match(*(View(ids, needed, 3 * number + i) for i, (ids, needed) in enumerate(row)))


def _simcse(config: LLM2VecConfig, parts: Parts) -> tuple[list[str], list[Row]]:
    """Each text twice, with nothing around it, as in the paper's code."""
    ids, texts = read_all_texts(config, parts.rejections)
    views = _laid_out(config, parts.tokenizer, "", Wrapper(), texts)
    return ids, [(view, view) for view in views]


def _supervised(config: LLM2VecConfig, parts: Parts) -> tuple[list[str], list[Row]]:
    """Queries, answers, and negative answers if all rows have one; as they will be encoded."""
    rows = []
    for row in read_rows(config.texts, parts.rejections):
        if row.negative_answer is not None and not row.negative_answer.strip():
            parts.rejections.add(row.id, "empty negative answer")
        else:
            rows.append(row)
    negatives = [row.negative_answer for row in rows if row.negative_answer is not None]
    if negatives and len(negatives) < len(rows):
        raise InputError(
            f"{len(rows) - len(negatives)} of {len(rows)} rows have no negative_answer: give all "
            "rows one, or none"
        )
    texts = [(config.query_prompt, [row.query for row in rows]), ("", [r.answer for r in rows])]
    texts += [("", negatives)] if negatives else []
    columns = [
        _laid_out(config, parts.tokenizer, prompt, parts.wrapper, [text.strip() for text in column])
        for prompt, column in texts
    ]
    return [row.id for row in rows], list(zip(*columns, strict=True))


def _laid_out(
    config: LLM2VecConfig, tokenizer: Tokenizer, prompt: str, wrapper: Wrapper, texts: Sequence[str]
) -> list[tuple[np.ndarray, int]]:
    """Ids of texts, and how many of the last are pooled."""
    assert config.max_length is not None
    layout = InstructedText(tokenizer, prompt, config.max_length, config.encoding, wrapper)
    sequences = layout(texts, 0)
    return list(zip(sequences.ids, sequences.needed.tolist(), strict=True))
