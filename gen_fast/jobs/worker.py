"""A process that makes parts: claim, read, embed, write, until no part is left.

`python -m gen_fast.jobs.worker DIR` is what the other processes of a machine run. All that decides
the bytes of a part is in the plan.
"""

import argparse
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import NoReturn

from gen_fast.embed.encoder import EncodedBlock, Encoder
from gen_fast.errors import GenFastError, InputError, JobError, NonFiniteError, TextError
from gen_fast.jobs.choices import DEFAULT_STALL_TIMEOUT
from gen_fast.jobs.claims import Claims
from gen_fast.jobs.corpus import CorpusReader, PartRows
from gen_fast.jobs.parts import PartStore, Record
from gen_fast.jobs.plan import Part, Plan
from gen_fast.jobs.watchdog import Watchdog
from gen_fast.model.device import make_current
from gen_fast.model.token_budget import is_out_of_memory

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
_POLL_SECONDS = 0.5


class _NoTokensError(Exception):
    """Some rows have nothing to pool; `parts` have been read and are to be made again."""

    def __init__(self, parts: list[Part]) -> None:
        super().__init__(parts)
        self.parts = parts


class Worker:
    """Makes parts of a job, with one encoder. A context manager, which gives back its claims.

    index, count: which of how many workers this is; they begin at different places of the plan.
    strict: a row that would be rejected is an InputError. on_texts: called with the number of
    texts of each batch. stall_timeout: seconds without progress after which the process ends
    itself, with a traceback, so that others can take its part; None never does.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        encoder: Encoder,
        *,
        index: int = 0,
        count: int = 1,
        strict: bool = False,
        on_texts: Callable[[int], object] = lambda texts: None,
        stall_timeout: float | None = None,
    ) -> None:
        self._store = PartStore(folder, plan)
        self._plan = plan
        self._encoder = encoder
        self._watchdog = Watchdog(stall_timeout)
        self._reader = CorpusReader(plan, self._watchdog.heartbeat)
        first = index * len(plan.parts) // count
        self._order = plan.parts[first:] + plan.parts[:first]
        self._strict = strict
        self._on_texts = on_texts
        self._stall_timeout = stall_timeout
        self._stopped = threading.Event()
        self._no_tokens: dict[int, set[int]] = {}
        self._claims = Claims(folder)

    def close(self) -> None:
        """Give back what this worker has claimed."""
        self._claims.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self) -> None:
        """Make parts until all of the job are there, also those of others that did not."""
        self._make(self._claimed())

    def make(self, parts: Iterable[Part]) -> None:
        """Make these parts."""
        self._make(self._taken(part) for part in parts)

    def _make(self, parts: Iterator[Part]) -> None:
        """Make parts. Raises what reading, embedding or writing does, naming the part."""
        while True:
            try:
                self._pipeline(parts)
            except _NoTokensError as error:
                parts = chain(error.parts, parts)  # without the rows that were found
            else:
                return

    def _pipeline(self, parts: Iterator[Part]) -> None:
        """Read, embed and write parts, each of which goes on while the others do."""
        read: deque[PartRows] = deque()
        written: deque[Future[None]] = deque()
        settings = self._plan.settings

        def texts() -> Iterator[list[str]]:
            for part in parts:
                read.append(self._read(part))
                yield read[-1].texts

        self._stopped.clear()
        try:
            with self._watchdog, ExitStack() as stack:
                writer = stack.enter_context(ThreadPoolExecutor(1, "gen_fast-write"))
                blocks = self._encoder.encode_blocks(
                    texts(),
                    prompt=settings.prompt,
                    normalize_embeddings=settings.normalize_embeddings,
                    truncate_dim=settings.truncate_dim,
                    on_progress=self._progress,
                )
                stack.enter_context(closing(blocks))
                # First of all: the thread that reads must not wait for others any more.
                stack.callback(self._stopped.set)
                started = time.monotonic()
                for block in blocks:
                    while written:
                        written.popleft().result()
                    now = time.monotonic()
                    written.append(writer.submit(self._write, read.popleft(), block, now - started))
                    started = now
                while written:
                    written.popleft().result()
        except TextError as error:
            while written:
                written.popleft().result()
            self._find_no_tokens(read, error)
        except NonFiniteError as error:
            raise NonFiniteError(self._placed(read[0], error.rows[0], error), ()) from error
        except RuntimeError as error:
            if isinstance(error, GenFastError) or not is_out_of_memory(error):
                raise
            raise JobError(f"out of memory; a smaller max_length needs less: {error}") from error

    def _find_no_tokens(self, read: deque[PartRows], error: TextError) -> NoReturn:
        """Have the rows of the last part that cannot be embedded rejected when it is read again."""
        if self._strict:
            raise InputError(self._placed(read[-1], error.rows[0], error)) from error
        without_tokens = self._no_tokens.setdefault(read[-1].part.number, set())
        without_tokens.update(read[-1].rows[row] for row in error.rows)
        raise _NoTokensError([rows.part for rows in read]) from error

    def _taken(self, part: Part) -> Part:
        # Whether or not another has it: the bytes are the same.
        self._claims.take(part.number)
        return part

    def _claimed(self) -> Iterator[Part]:
        """Claim and yield parts until none is left that is neither finished nor claimed here.

        Others are waited for. If one of them ends without finishing, its part is free; if nothing
        has come of it for a stall_timeout, it is made here too, to the same bytes.
        """
        left, mine = list(self._order), set()
        patience = self._stall_timeout or DEFAULT_STALL_TIMEOUT
        deadline = time.monotonic() + patience
        while True:
            before = len(left)
            left = [p for p in left if p.number not in mine and self._store.record(p) is None]
            if not left:
                return
            if len(left) < before:
                deadline = time.monotonic() + patience
            hung = time.monotonic() > deadline
            for part in left:
                if not self._claims.take(part.number) and not hung:
                    continue
                if self._store.record(part) is not None:  # finished since it was looked at
                    self._claims.release(part.number)
                    continue
                if hung:
                    logger.warning("part %d: its process seems to hang", part.number)
                mine.add(part.number)
                yield part
            if not mine.intersection(part.number for part in left):
                self._watchdog.heartbeat()
                if self._stopped.wait(_POLL_SECONDS):
                    return

    def _read(self, part: Part) -> PartRows:
        read = self._reader.read(part, self._no_tokens.get(part.number, ()))
        self._watchdog.heartbeat()
        if self._strict and read.rejected:
            row = read.rejected[0]
            raise InputError(f"{row.input}, {row.place}: {row.kind}: {row.reason} (--strict)")
        return read

    def _write(self, read: PartRows, block: EncodedBlock, seconds: float) -> None:
        try:
            record = self._store.write(read, block.embeddings, block.truncated)
            self._log(record, seconds)
        except OSError as error:
            raise JobError(
                f"cannot write {self._store.path(read.part)}: {error.strerror or error}; the "
                "finished parts are intact: run again when this is mended"
            ) from error
        except OverflowError as error:
            raise JobError(f"part {read.part.number}: {error}") from error
        self._claims.release(read.part.number)

    def _log(self, record: Record, seconds: float) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "part": record.part,
            "rows": record.rows,
            "rejected": record.all_rows - record.rows,
            "truncated": record.truncated,
            "seconds": round(seconds, 3),
            "rows_per_second": round(record.rows / max(seconds, 1e-9), 1),
        }
        with (self._store.folder / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _placed(self, read: PartRows, row: int, error: Exception) -> str:
        path = self._plan.inputs[read.part.input].path
        return f"{path}, id {read.ids[row]}: {error}"

    def _progress(self, texts: int) -> None:
        self._watchdog.heartbeat()
        self._on_texts(texts)


def end_with_parent() -> None:
    """End this process when its parent does, which holds the other end of stdin."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Run one worker of a job that is planned."""
    parser = argparse.ArgumentParser(prog="python -m gen_fast.jobs.worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--stall-timeout", type=float, default=DEFAULT_STALL_TIMEOUT)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    end_with_parent()
    make_current(options.device)
    try:
        plan = Plan.load(options.folder)
        with Worker(
            options.folder,
            plan,
            plan.settings.load_encoder(options.device),
            index=options.index,
            count=options.count,
            strict=options.strict,
            stall_timeout=options.stall_timeout,
        ) as worker:
            worker.run()
    except (GenFastError, OSError) as error:
        print(f"worker {options.index}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
