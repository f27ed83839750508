"""Windows of texts, laid out ahead of the model: within one, texts are sorted by length."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from gen_fast.embed.layouts import Layout, Sequences
from gen_fast.io.texts import check_texts

T = TypeVar("T")

# Large enough that equal lengths meet, small enough
# that the window's ids take a few megabytes.
WINDOW_TEXTS = 4096
WINDOW_CHARACTERS = 1 << 23
# On a GPU: the first texts of a block, which nothing is computed beside while they are tokenised.
FIRST_WINDOW_TEXTS = 256


@dataclass(frozen=True)
class Window:
    """Texts of a block from row `start` on, laid out; truncated: texts of all blocks so far."""

    sequences: Sequences
    start: int
    block_size: int
    truncated: int
    is_last: bool


def window_bounds(texts: Sequence[str], first: int | None = None) -> Iterator[slice]:
    """Cut the texts into windows of bounded count and size. first: texts of the first, at most."""
    start = characters = 0
    for i, text in enumerate(texts):
        most = WINDOW_TEXTS if start or first is None else first
        full = i - start >= most or characters + len(text) > WINDOW_CHARACTERS
        if i > start and full:
            yield slice(start, i)
            start, characters = i, 0
        characters += len(text)
    if start < len(texts):
        yield slice(start, len(texts))


def windows(
    blocks: Iterable[Sequence[str]], layout: Layout, first: int | None = None
) -> Iterator[Window]:
    """Lay out the texts of blocks, window by window; a block without texts has an empty one.

    first: texts of a block's first window, at most.
    """
    for rows in blocks:
        check_texts(rows)
        bounds = list(window_bounds(rows, first)) or [slice(0, 0)]
        for bound in bounds:
            sequences = layout(rows[bound], bound.start)
            yield Window(sequences, bound.start, len(rows), layout.truncated, bound is bounds[-1])


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Draw each item in a thread while the one before it is used."""
    with ThreadPoolExecutor(1, "gen_fast-tokenize") as executor:
        pending = executor.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = executor.submit(next, items, None)
            yield item
