"""The sequences of a window: cut into batches and run, side by side where that is faster."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from gen_fast.model.backbone import PrefixKV
from gen_fast.model.batch import split_by_budget
from gen_fast.model.stream_choice import StreamChooser
from gen_fast.model.streams import Streams
from gen_fast.model.token_budget import TokenBudget, is_out_of_memory


@dataclass(frozen=True)
class Batch:
    """Sequences that are run together, behind the prefix that they share.

    members [n]: which of the window. lengths [n]: tokens of each, the prefix not among them.
    """

    members: np.ndarray
    lengths: np.ndarray
    prefix: PrefixKV | None

    @property
    def tokens(self) -> int:
        """Tokens that are run."""
        return int(self.lengths.sum())

    def cut(self, budget: int, texts: int | None = None) -> Iterator["Batch"]:
        """Batches of at most `budget` tokens and so many texts, in the same order."""
        for part in split_by_budget(self.lengths, budget, texts):
            yield Batch(self.members[part], self.lengths[part], self.prefix)


def run_batches(
    batches: Sequence[Batch],
    run: Callable[[Batch], Tensor],
    budget: TokenBudget,
    chooser: StreamChooser,
    *,
    in_flight: bool = False,
) -> Generator[tuple[np.ndarray, Tensor], None, None]:
    """Yield (members, embeddings) of the batches in their order; raise the first one's error.

    A batch for which memory does not suffice is run again: first alone, then in smaller ones.
    On a GPU (in_flight) a batch is launched before the one before it is waited for.
    """
    choice = chooser.choose([batch.tokens for batch in batches])
    pending = deque(batches)
    running: deque[tuple[Batch, bool, Callable[[], Tensor]]] = deque()
    for_streams = choice.side_by_side(len(pending))
    with Streams(choice.count) as streams:
        while pending or running:
            # As many again are waiting, so that no stream does. What all threads run comes alone.
            most = 2 * choice.count if for_streams else 2 if in_flight else 1
            while pending and len(running) < most:
                batch = pending.popleft()
                begin = streams.start if for_streams else launched if in_flight else partial
                running.append((batch, for_streams > 0, begin(run, batch)))
                for_streams = max(0, for_streams - 1)
            batch, in_stream, result = running.popleft()
            try:
                embeddings = result()
            except RuntimeError as error:  # only running out of memory is survived
                pending.appendleft(batch)
                if in_stream and is_out_of_memory(error):
                    chooser.run_one_by_one()
                    for_streams = 0
                else:
                    budget.shrink(error, batch.tokens, len(batch.members))
                    pending = deque(part for whole in pending for part in whole.cut(budget.tokens))
                continue
            yield batch.members, embeddings


def launched(run: Callable[[Batch], Tensor], batch: Batch) -> Callable[[], Tensor]:
    """Launch a batch, and the copy of its result to the host. What is returned waits for that.

    A RuntimeError of the launch, such as no memory, is raised there too: in the order of the
    batches.
    """
    try:
        result = run(batch)
        copied = torch.empty(result.shape, dtype=result.dtype, pin_memory=result.is_cuda)
        copied.copy_(result, non_blocking=True)
        event = None
        if result.is_cuda:
            with torch.cuda.device(result.device):
                event = torch.cuda.Event()
                event.record()
    except RuntimeError as error:
        return partial(_raise, error)

    def waited() -> Tensor:
        if event is not None:
            event.synchronize()
        return copied

    return waited


def _raise(error: RuntimeError) -> NoReturn:
    raise error


def averaged(
    parts: Iterable[tuple[np.ndarray, Tensor]], counts: np.ndarray
) -> Generator[tuple[np.ndarray, Tensor], None, None]:
    """What `parts` give of sequences, as the mean over those of each text."""
    done = list(parts)
    if done:
        order = np.argsort(np.concatenate([members for members, _ in done]))
        rows = torch.cat([embeddings for _, embeddings in done])[torch.from_numpy(order)]
        means = torch.stack([part.mean(0) for part in rows.split(counts.tolist())])
        yield np.arange(len(counts)), means
