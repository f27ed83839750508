"""Answers to queries, written by the backbone itself: resumable, sharded, a row a query."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from gen_fast.errors import InputError
from gen_fast.io.text_files import Texts
from gen_fast.model.generation import ROUNDS, AnswerGenerator
from gen_fast.training.records import RecordFile, Rejections, log_stops
from gen_fast.training.report import hidden

logger = logging.getLogger(__name__)

# A longer query would be cut anyway: encoders take 512 tokens by default.
MAX_QUERY_CHARACTERS = 20_000


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`: the rows whose number leaves `index` when divided by `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"shard {self.index} of {self.count} does not exist")

    def path(self, out: Path) -> Path:
        """`out`, with the shard in its name if there is more than one."""
        if self.count == 1:
            return out
        return out.with_name(f"{out.stem}-{self.index:05d}-of-{self.count:05d}{out.suffix}")


def usable_queries(queries: Texts, rejections: Rejections) -> Texts:
    """Leave out queries that are empty, over-long or there already; and ids that come twice."""
    ids: list[str] = []
    texts: list[str] = []
    seen_ids, seen_texts = set(), set()
    for identifier, text in zip(queries.ids, queries.texts, strict=True):
        stripped = text.strip()
        if not stripped:
            rejections.add(identifier, "empty query")
        elif len(stripped) > MAX_QUERY_CHARACTERS:
            rejections.add(identifier, f"query longer than {MAX_QUERY_CHARACTERS} characters")
        elif identifier in seen_ids:
            rejections.add(identifier, "duplicate id")
        elif stripped in seen_texts:
            rejections.add(identifier, "duplicate query")
        else:
            seen_ids.add(identifier)
            seen_texts.add(stripped)
            ids.append(identifier)
            texts.append(stripped)
    if not ids:
        raise InputError(f"there is no usable query among {len(queries.ids)}")
    return Texts(ids, texts)


def generate_answers(
    queries: Texts,
    out: Path,
    generator: AnswerGenerator,
    *,
    shard: Shard = Shard(),
    show_progress_bar: bool | None = None,
) -> Path:
    """Write {"id", "query", "answer", "finish_reason"} a line to `out`; return the file's path.

    Queries are handed over in lots of eight batches, where an answer that ends makes room for the
    next; these are fixed by the queries and the batch size, so an interrupted run continues with
    the lot that it was in and writes what it would have written. Rows come shortest query first.
    How many answers were cut at the generator's limit of tokens is logged.
    Raises InputError if `out` was begun with other queries or settings.
    """
    rejections = Rejections(out.with_name(f"{out.stem}.rejected.jsonl"))
    queries = usable_queries(queries, rejections)
    rejections.write()
    ids, texts = (values[shard.index :: shard.count] for values in (queries.ids, queries.texts))
    settings = {**generator.settings, "queries_sha256": _digest([*ids, *texts])}
    file = RecordFile(shard.path(out), settings)
    done = {row["id"] for row in file.rows}
    with tqdm(
        total=len(ids), initial=len(done), unit="answer", disable=hidden(show_progress_bar)
    ) as bar:
        for members in generator.plan(texts):
            missing = [i for i in members if ids[i] not in done]
            if not missing:
                continue
            # The whole lot again: what a text becomes may depend on its neighbours' rounding.
            answers = generator.batch([texts[i] for i in members])
            answer_of = dict(zip(members, answers, strict=True))
            file.append(
                {
                    "id": ids[i],
                    "query": texts[i],
                    "answer": answer_of[i].text.strip(),
                    "finish_reason": answer_of[i].finish_reason,
                }
                for i in missing
            )
            bar.update(len(missing))
    stopped = sum(row["finish_reason"] == "stop" for row in file.rows)
    log_stops(file.path, stopped, len(file.rows))
    return file.path


def write_own_queries(
    count: int, out: Path, generator: AnswerGenerator, *, show_progress_bar: bool | None = None
) -> Texts:
    """Let the model write `count` different queries; keep them in `out`, {"id", "text"} a line.

    Queries that are empty, cut off at the token limit or already there are dropped and counted.
    Raises InputError when four times as many attempts have not been enough.
    """
    file = RecordFile(out, generator.settings)
    texts = [row["text"] for row in file.rows]
    seen = set(texts)
    # Numbers of batches go on where the file ends, so that a resumed run draws what is missing.
    size = generator.batch_size
    number = 1 + max((row["batch"] for row in file.rows), default=-1)
    with tqdm(
        total=count, initial=len(texts), unit="query", disable=hidden(show_progress_bar)
    ) as bar:
        while len(texts) < count:
            if number * size > 4 * count + 10 * size:
                raise InputError(
                    f"{out}: only {len(texts)} of {count} queries after {number} batches; "
                    "a higher temperature or token limit may give more"
                )
            # As many batches together as are needed if every query is good: the draws are the same.
            batches = min(ROUNDS, -(-(count - len(texts)) // size))
            rows = []
            for i, answer in enumerate(generator.own_queries(batches * size, number * size)):
                text = " ".join(answer.text.split())
                good = text and answer.finish_reason == "stop" and text not in seen
                if good and len(texts) < count:
                    batch = number + i // size
                    rows.append({"id": f"own-{len(texts)}", "text": text, "batch": batch})
                    seen.add(text)
                    texts.append(text)
            file.append(rows)
            bar.update(len(rows))
            number += batches
    return Texts([f"own-{i}" for i in range(count)], texts[:count])


def _digest(values: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(f"{len(value)}:{value}".encode())
    return digest.hexdigest()
