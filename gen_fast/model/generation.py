"""Text written by the backbone itself: answers to questions, and questions of its own."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gen_fast.errors import UnsupportedModelError
from gen_fast.model.backbone import Backbone
from gen_fast.model.decoding import BATCH_SIZE, Decoder, FinishReason
from gen_fast.model.model_files import read_json
from gen_fast.model.prefix import PrefixCache
from gen_fast.model.sampling import GENERATION_CONFIG, Sampling, own_sampling, uniform_draws
from gen_fast.model.tokenizing import Tokenizer
from gen_fast.model.weights import load_head

# Batches' worth of questions that are handed over together. So many are lost in a crash.
ROUNDS = 8


@dataclass(frozen=True)
class Answer:
    """What the model wrote. finish_reason: "stop" at an end token, "length" when cut off."""

    text: str
    finish_reason: FinishReason


class AnswerGenerator:
    """Answers through the chat template, thinking off, `batch_size` at a time.

    With a batch size of 1 each answer is written alone, with bits that depend on nothing else.
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
        batch_size: int = BATCH_SIZE,
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
        """Positions of the questions handed over together, shortest first; the same for the same.

        What stands before all of these is run once.
        """
        lengths = [len(self.chat_ids(question)) for question in questions]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        size = self.batch_size * ROUNDS if self.batch_size > 1 else 1
        return [order[start : start + size] for start in range(0, len(order), size)]

    def batch(self, questions: Sequence[str], numbers: Sequence[int] | None = None) -> list[Answer]:
        """Answer questions together. numbers: of the draws, where a question comes again."""
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
            uniform = np.stack(each)
        decoded = self._decoder.decode(
            [ids[shared:] for ids in rows],
            self.max_new_tokens,
            sampling,
            prefix=self._prefixes.get(tuple(rows[0][:shared].tolist())),
            uniform=uniform,
            batch_size=self.batch_size,
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
