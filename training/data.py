"""Queries, answers and teacher vectors, in the order in which a run sees them."""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gen_fast.errors import ConfigError, InputError
from gen_fast.io.embedding_files import read_embeddings
from gen_fast.model.decoding import FinishReason
from gen_fast.model.tokenizing import TextTokenizer, Tokenizer, special_tokens_around
from gen_fast.training.config import TrainConfig
from gen_fast.training.records import Rejections, placed_records

logger = logging.getLogger(__name__)

# A mark of Latin or of East Asian writing, with the quotes and brackets that it closes; or a line's
# end. East Asian sentences follow each other without a space. The number of a list's item is none.
_SENTENCE_END = re.compile(
    r"""^[ ]*\d+\.|(?P<end>[.!?…]+["'”’»)\]]*(?=\s|\Z)|[。！？．｡]+["'”’」』）》】]*|\n)""",  # noqa: RUF001
    re.MULTILINE,
)
NEGATIVE_SUFFIX = "#negative"  # of a row's id, in a file of teacher vectors


@dataclass(frozen=True)
class Row:
    """A query with its answer; a negative answer, perhaps with the query that it answers.

    is_whole: the answer ended by itself, and was not cut at a limit of tokens.
    """

    id: str
    query: str
    answer: str
    negative_query: str | None = None
    negative_answer: str | None = None
    is_whole: bool = True


def read_rows(paths: Sequence[str | Path], rejections: Rejections) -> list[Row]:
    """Read answer files. Rows without an answer, or seen before, are left out and counted.

    A finish_reason "length" says that an answer was cut at a limit of tokens: it ends at the last
    sentence that is whole, if that leaves half of it. Without a finish_reason it is whole.
    Raises InputError naming file and line for a row that is malformed.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for path in paths:
        for place, record in placed_records(Path(path)):
            row = _row(place, record)
            if not row.query.strip() or not row.answer.strip():
                rejections.add(row.id, "empty query or answer")
            elif row.id in seen:
                rejections.add(row.id, "duplicate id")
            else:
                seen.add(row.id)
                rows.append(row)
    if not rows:
        raise InputError(f"{', '.join(map(str, paths))}: no usable row")
    return rows


def _row(place: str, record: Any) -> Row:
    if not isinstance(record, dict):
        raise InputError(f"{place}: expected an object with id, query and answer")
    values: dict[str, Any] = {name: record.get(name) for name in ("id", "query", "answer")}
    for name, value in values.items():
        if not isinstance(value, str):
            raise InputError(f"{place}: expected a string as {name}, got {value!r:.60}")
    negative = [record.get(f"negative_{name}") for name in ("query", "answer")]
    for value in negative:
        if value is not None and not isinstance(value, str):
            raise InputError(f"{place}: expected a string as negative, got {value!r:.60}")
    if negative[1] is None and negative[0] is not None:
        raise InputError(f"{place}: a negative query goes with a negative answer")
    reason = record.get("finish_reason") or "stop"
    if reason not in get_args(FinishReason):
        raise InputError(f"{place}: expected stop or length as finish_reason, got {reason!r:.60}")
    if reason == "length":
        values["answer"] = whole_sentences(values["answer"])
    return Row(
        **values,
        negative_query=negative[0],
        negative_answer=negative[1],
        is_whole=reason == "stop",
    )


def whole_sentences(text: str) -> str:
    """`text` up to the end of its last whole sentence or paragraph; all if that is less than half.

    The end of the text itself counts only with its full stop.
    """
    text = text.strip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if match["end"]]
    cut = text[: ends[-1]].strip() if ends else ""
    return cut if 2 * len(cut) >= len(text) else text


def teacher_texts(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Ids and texts that a teacher embeds: every answer, and every negative answer."""
    ids = [row.id for row in rows]
    texts = [row.answer.strip() for row in rows]
    for row in rows:
        if row.negative_answer is not None:
            ids.append(row.id + NEGATIVE_SUFFIX)
            texts.append(row.negative_answer.strip())
    return ids, texts


@dataclass(frozen=True)
class Example:
    """A row as token ids: query (with prompt), answer (with beginning and end), repeated answer,
    negatives.

    vector, negative_vector [d]: the teacher's.
    """

    query: np.ndarray
    answer: np.ndarray
    vector: np.ndarray
    repeat: np.ndarray | None = None
    negative_query: np.ndarray | None = None
    negative_repeat: np.ndarray | None = None
    negative_vector: np.ndarray | None = None


class TrainingData:
    """Rows with their teacher vectors, split into training and validation.

    train, validation: rows; `examples` tokenises some of them. dimension: of the teacher.
    teacher_variance: of its vectors of the rows to train on, the mean over dimensions. stopped: how
    many of the answers to train on ended by themselves. rejections: rows that are not trained on.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, rejections: Rejections) -> None:
        self._config = config
        self.rejections = rejections
        rows = read_rows(config.answers, rejections)
        if config.needs_negatives:
            without = [row for row in rows if row.negative_query is None]
            for row in without:
                rejections.add(row.id, "no negative query")
            rows = [row for row in rows if row.negative_query is not None]
            if not rows:
                raise ConfigError("negatives are asked for, and no row has a negative_query")
        self._vectors = _teacher_vectors(config.teacher, rows)
        self.dimension = len(next(iter(self._vectors.values())))
        held = smallest_hashes([row.id for row in rows], config.validation_rows)
        self.validation = [row for row in rows if row.id in held]
        self.train = [row for row in rows if row.id not in held]
        if not self.train:
            raise ConfigError(
                f"{len(rows)} rows, of which {config.validation_rows} for validation: none is left"
            )
        self.stopped = sum(row.is_whole for row in self.train)
        self.teacher_variance = _variance([self._vectors[row.id] for row in self.train])
        if not self.teacher_variance:
            raise InputError(f"{config.teacher}: all vectors are equal: nothing can be learnt")
        room = config.max_length - config.n_special
        self._query = TextTokenizer(tokenizer, config.prompt, room)
        if config.needs_repeats or config.needs_negatives:
            self._repeat = TextTokenizer(tokenizer, config.repeat_prompt, room)
        # One token more than there is room for tells an answer that is cut.
        self._answer = TextTokenizer(
            tokenizer, "", config.max_answer_tokens + 1, add_special_tokens=False
        )
        self._beginning, _ = special_tokens_around(tokenizer.core)
        self._end_text, self._end_ids = _answer_end(config.answer_end, tokenizer)

    def fingerprint(self) -> str:
        """A hash of all rows and vectors: a run is continued with the same data only."""
        digest = hashlib.sha256()
        for row in (*self.train, *self.validation):
            digest.update(repr(row).encode())
        for vector in self._vectors.values():
            digest.update(vector.tobytes())
        return digest.hexdigest()

    def sample(self, count: int) -> list[Row]:
        """`count` training rows, or all, drawn by the seed: files may be sorted."""
        order = np.random.default_rng([self._config.seed, 0]).permutation(len(self.train))
        return [self.train[i] for i in order[:count]]

    def step_rows(self, step: int) -> list[Row]:
        """The rows of training step `step`, counted from 0: epochs of seeded permutations."""
        places = epoch_places(len(self.train), self._config.seed, step, self._config.batch_size)
        return [self.train[i] for i in places]

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenise rows."""
        config = self._config
        columns: dict[str, list[Any]] = {
            "query": self._query([row.query.strip() for row in rows])[0],
            "answer": self._answers(rows),
            "vector": [self._vectors[row.id] for row in rows],
        }
        if config.needs_repeats:
            columns["repeat"] = self._repeat([row.answer.strip() for row in rows])[0]
        if config.needs_negatives:
            negatives = [((row.negative_query or ""), (row.negative_answer or "")) for row in rows]
            columns["negative_query"] = self._query([query.strip() for query, _ in negatives])[0]
            columns["negative_repeat"] = self._repeat([text.strip() for _, text in negatives])[0]
            columns["negative_vector"] = [self._vectors[row.id + NEGATIVE_SUFFIX] for row in rows]
        names = list(columns)
        return [
            Example(**dict(zip(names, values, strict=True)))
            for values in zip(*columns.values(), strict=True)
        ]

    def _answers(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Ids of answers: the tokenizer's beginning, as the reference has it, and an earned end.

        What is too long loses its tail, and with it the end.
        """
        texts = [row.answer.strip() + (self._end_text if row.is_whole else "") for row in rows]
        answers = []
        for row, ids in zip(rows, self._answer(texts)[0], strict=True):
            end = self._end_ids if row.is_whole else self._end_ids[:0]
            whole = np.concatenate((self._beginning, ids, end))
            answers.append(whole[: self._config.max_answer_tokens])
        return answers


def _answer_end(literal: str | None, tokenizer: Tokenizer) -> tuple[str, np.ndarray]:
    """Text and ids that end an answer; one of them is empty."""
    if literal is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end of text: give answer_end")
        return "", np.array([tokenizer.eos_token_id], dtype=np.int32)
    known = tokenizer.added_token_id(literal)
    if known is None:
        return literal, np.empty(0, dtype=np.int32)
    return "", np.array([known], dtype=np.int32)


def _teacher_vectors(path: str, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The vector of every answer, by id. Raises InputError if one is missing or of another text."""
    made = read_embeddings(path)
    where = {identifier: i for i, identifier in enumerate(made.ids)}
    ids, texts = teacher_texts(rows)
    for identifier, text in zip(ids, texts, strict=True):
        if identifier not in where:
            raise InputError(f"{path} has no vector for row {identifier!r}: run gen-fast teach")
        if made.texts is not None and made.texts[where[identifier]] != text:
            raise InputError(
                f"{path} was made for another answer of row {identifier!r}: run gen-fast teach"
            )
    return {identifier: made.vectors[where[identifier]] for identifier in ids}


def _variance(vectors: Sequence[np.ndarray]) -> float:
    """Variance of vectors [d], the mean over dimensions; 0 if they differ by rounding alone."""
    # One by one: all of them in float64 may take gigabytes.
    mean = sum((v.astype(np.float64) for v in vectors), np.zeros(len(vectors[0]))) / len(vectors)
    variance = sum(float(np.square(v - mean).mean()) for v in vectors) / len(vectors)
    return variance if variance > 1e-12 * np.square(mean).mean() else 0.0


def epoch_places(n: int, seed: int, step: int, size: int) -> list[int]:
    """Which of n rows a step of `size` rows takes: epochs of seeded permutations, end to end."""
    positions = np.arange(step * size, (step + 1) * size)
    places: list[int] = []
    for epoch in np.unique(positions // n):
        order = np.random.default_rng([seed, int(epoch)]).permutation(n)
        places += order[positions[positions // n == epoch] % n].tolist()
    return places


def smallest_hashes(ids: Sequence[str], count: int) -> set[str]:
    """`count` of the ids, chosen by a hash: the same ones whatever else is in the file."""
    return set(sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())[:count])
