"""Text written by the backbone itself: token by token, over the same weights, with a KV cache."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gen_fast.errors import UnsupportedModelError
from gen_fast.model.backbone import Backbone, PrefixKV, padded_rows
from gen_fast.model.batch import PackedBatch
from gen_fast.model.linear import linear, pack
from gen_fast.model.model_files import read_json
from gen_fast.model.prefix import PrefixCache
from gen_fast.model.sampling import (
    GENERATION_CONFIG,
    GREEDY,
    Sampling,
    next_tokens,
    own_sampling,
    uniform_draws,
)
from gen_fast.model.tokenizing import Tokenizer
from gen_fast.model.weights import load_head
from gen_fast.ops.norm import rms_norm

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Answer:
    """What the model wrote. finish_reason: "stop" at an end token, "length" when cut off."""

    text: str
    finish_reason: FinishReason


class Decoder:
    """Continues token sequences, a batch at a time: prefill, then one pass a token.

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
        uniform: Tensor | None = None,
    ) -> list[tuple[np.ndarray, FinishReason]]:
        """Continue each sequence of ids [n_i] by at most `max_new_tokens`: new ids, why it ended.

        special [k, h]: embeddings of ids V, V + 1, …, such as the soft prompts of an embedding.
        prefix: keys and values before each sequence. blocks [n, 2]: special tokens of each sequence
        under the GEM mask, see PackedBatch; what is written sees these and not what comes before
        them. uniform [n, max_new_tokens] float64: numbers from [0, 1) that tokens are drawn by, if
        they are.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        backbone = self.backbone
        written: list[list[int]] = [[] for _ in sequences]
        reasons: list[FinishReason] = ["length"] * len(sequences)
        shared = 0 if prefix is None else len(prefix)
        cache = backbone.new_cache([len(ids) + max_new_tokens - 1 for ids in sequences])
        rows = list(sequences)
        for step in range(max_new_tokens):
            batch = PackedBatch.pack(
                rows,
                needed=[1] * len(rows),
                prefix_length=cache.held + shared,
                blocks=None if blocks is None else blocks[cache.active],
                device=backbone.device,
            )
            hidden = backbone.forward(
                batch,
                special=special,
                prefix=prefix,
                cache=cache,
                mask="causal" if blocks is None else "gem",
            )
            numbers = None if uniform is None else uniform[cache.active, step]
            tokens = self._next(hidden, sampling, numbers)
            ended = np.isin(tokens, self._end_ids)
            for text in cache.active[ended]:
                reasons[text] = "stop"
            cache.keep(np.flatnonzero(~ended))
            tokens = tokens[~ended]
            for text, token in zip(cache.active, tokens, strict=True):
                written[text].append(int(token))
            if not len(tokens) or step + 1 == max_new_tokens:
                break
            rows = list(tokens[:, None])
        return [
            (np.array(ids, dtype=np.int64), why) for ids, why in zip(written, reasons, strict=True)
        ]

    def _next(self, hidden: Tensor, sampling: Sampling, uniform: Tensor | None) -> np.ndarray:
        """The token after each row of `hidden` [B, h]: [B] int64."""
        backbone = self.backbone
        states = rms_norm(hidden, backbone.final_norm, backbone.config.norm_eps)
        count = len(states)
        if self._head.is_mkldnn:  # few numbers of rows, see padded_rows
            states = torch.nn.functional.pad(states, (0, 0, 0, padded_rows(count) - count))
        logits = linear(states, self._head)[:count]
        return next_tokens(logits, sampling, uniform).cpu().numpy()


class AnswerGenerator:
    """Answers through the chat template, thinking off, in length-sorted batches.

    sampling: None takes that of the model's own generation_config.json (see own_sampling). What is
    drawn for a question does not depend on the others of its batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        directory: str | Path,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int = 128,
        batch_size: int = 64,
        sampling: Sampling | None = None,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.sampling = own_sampling(directory) if sampling is None else sampling
        self._tokenizer = tokenizer
        self._decoder = Decoder(
            backbone,
            load_head(directory, backbone),
            end_token_ids(directory, tokenizer.eos_token_id),
        )
        self._prefixes = PrefixCache(backbone)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that an answer depends on, besides the question."""
        return {
            "backbone": self._decoder.backbone.fingerprint,
            "dtype": str(self._decoder.backbone.dtype),
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            **asdict(self.sampling),
        }

    def answers(self, questions: Sequence[str], samples: int = 1) -> list[Answer]:
        """`samples` answers a question, in order, those of a question one after another."""
        asked = [question for question in questions for _ in range(samples)]
        answers: list[Answer] = [Answer("", "length")] * len(asked)
        for members in self.plan(asked):
            numbers = [i % samples for i in members]
            written = self.batch([asked[i] for i in members], numbers)
            for i, answer in zip(members, written, strict=True):
                answers[i] = answer
        return answers

    def plan(self, questions: Sequence[str]) -> list[list[int]]:
        """Positions of the questions in batches, shortest first; the same for the same ones."""
        lengths = [len(self.chat_ids(question)) for question in questions]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = self.batch_size
        return [order[start : start + size] for start in range(0, len(order), size)]

    def batch(self, questions: Sequence[str], numbers: Sequence[int] | None = None) -> list[Answer]:
        """Answer questions in one batch. numbers: of the draws, where a question comes again."""
        rows = [self.chat_ids(question) for question in questions]
        draws = zip(questions, numbers or [0] * len(questions), strict=True)
        return self._write(rows, draws, self.sampling)

    def own_queries(self, count: int, first: int = 0) -> list[Answer]:
        """Let the model write `count` users' messages, from the opening of a user's turn alone.

        They are drawn at temperature 1 if answers are greedy: else all would be the same. Message
        `first` is the same whatever `count` is. Source: Magpie, arXiv 2406.08464.
        """
        sampling = replace(self.sampling, temperature=self.sampling.temperature or 1.0)
        opening = self._user_turn_opening()
        ids = self._tokenizer.ids(opening, add_special_tokens=False)
        draws = ((opening, first + i) for i in range(count))
        return self._write([ids] * count, draws, sampling)

    @torch.inference_mode()
    def _write(
        self, rows: list[np.ndarray], draws: Iterable[tuple[str, int]], sampling: Sampling
    ) -> list[Answer]:
        # The template's opening is the same for all. A text keeps a token of its own.
        shared = min(_common_prefix(rows), min(len(row) for row in rows) - 1)
        uniform = None
        if sampling.temperature:
            each = [uniform_draws(sampling.seed, *draw, self.max_new_tokens) for draw in draws]
            uniform = torch.from_numpy(np.stack(each)).to(self._decoder.backbone.device)
        decoded = self._decoder.decode(
            [ids[shared:] for ids in rows],
            self.max_new_tokens,
            sampling,
            prefix=self._prefixes.get(tuple(rows[0][:shared].tolist())),
            uniform=uniform,
        )
        return [Answer(self._tokenizer.decode(ids), reason) for ids, reason in decoded]

    def chat_ids(self, question: str) -> np.ndarray:
        """Ids [n] of a question in the chat template, up to where the answer begins."""
        if not self._tokenizer.transformers.chat_template:
            return self._tokenizer.ids(question, add_special_tokens=True)
        return self._tokenizer.ids(self._chat(question), add_special_tokens=False)

    def _chat(self, message: str) -> str:
        text = self._tokenizer.transformers.apply_chat_template(
            [{"role": "user", "content": message}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return str(text)

    def _user_turn_opening(self) -> str:
        marker = "\N{WHITE SQUARE}message\N{WHITE SQUARE}"
        template = self._tokenizer.transformers.chat_template
        opening, rest, _ = (self._chat(marker) if template else "").partition(marker)
        if not rest:
            raise UnsupportedModelError("own queries need a model with a chat template")
        return opening


def _common_prefix(rows: Sequence[np.ndarray]) -> int:
    """How many leading ids all rows share."""
    length = min(len(row) for row in rows)
    stacked = np.stack([row[:length] for row in rows])
    differs = np.flatnonzero((stacked != stacked[0]).any(axis=0))
    return int(differs[0]) if len(differs) else length


def end_token_ids(directory: str | Path, eos_token_id: int | None) -> list[int]:
    """Tokens that end a text: the tokenizer's, and generation_config.json's if there is one."""
    ids = [eos_token_id]
    path = Path(directory) / GENERATION_CONFIG
    if path.is_file():
        declared = read_json(path).get("eos_token_id")
        ids += declared if isinstance(declared, list) else [declared]
    return [i for i in ids if i is not None]
