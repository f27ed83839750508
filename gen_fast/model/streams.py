"""Streams: batches run side by side over one copy of the weights, each with some of the threads.

A batch on all threads waits at the end of every op for the slowest of them; batches beside each
other wait only for their own. How many streams pay is measured: see stream_choice.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Self, TypeVar

import torch

from gen_fast.ops import native

T = TypeVar("T")


class Streams:
    """Runs `count` functions at a time, each with an equal share of the caller's torch threads.

    A context manager: on leaving, what has not begun is dropped, what runs is waited for, and no
    thread remains. The number of threads of the caller, and of others, stays as it is.
    """

    def __init__(self, count: int) -> None:
        threads = max(1, torch.get_num_threads() // count)
        # Its threads start when there is something to run.
        self._executor = ThreadPoolExecutor(
            count, "gen_fast-stream", initializer=_limit_this_thread, initargs=(threads,)
        )

    def start(self, function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
        """Call `function` as soon as a stream is free. What is returned waits for its result."""
        return self._executor.submit(function, *arguments).result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)


def _limit_this_thread(threads: int) -> None:
    torch.get_num_threads()  # torch gives each thread its default once, when it first asks
    native.module().limit_calling_thread(threads)


@cache
def unsupported() -> str | None:
    """Why streams cannot run on the CPU here, or None."""
    reason = native.missing()
    if reason is not None:
        return f"gen_fast._C {reason}"
    if torch.get_num_threads() > 1:
        with Streams(torch.get_num_threads()) as streams:
            if streams.start(torch.get_num_threads)() != 1:
                return "torch does not take its number of threads from OpenMP"
    return None
