"""A process that makes parts: claim, read, embed, write, until no part is left.

`python -m gen_fast.jobs.worker DIR` is what the other processes of a machine run. All that decides
the bytes of a part is in the plan.
"""

import argparse
import faulthandler
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
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from gen_fast.encoder import Encoder
from gen_fast.errors import GenFastError, InputError, JobError, NonFiniteError, TextError
from gen_fast.jobs.claims import Claims
from gen_fast.jobs.corpus import CorpusReader, PartRows
from gen_fast.jobs.parts import PartStore, Record
from gen_fast.jobs.plan import Part, Plan, Settings
from gen_fast.loading import identify, load

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
DEFAULT_STALL_TIMEOUT = 600.0
_POLL_SECONDS = 0.5


def load_encoder(settings: Settings, device: str | torch.device | None) -> Encoder:
    """The encoder that a plan asks for. Raises JobError if this machine has another model."""
    found = identify(
        settings.model,
        method=settings.method,
        backbone=settings.backbone,
        revision=settings.revision,
    )
    if found != settings.identity:
        wrong = [key for key in settings.identity if found.get(key) != settings.identity[key]]
        raise JobError(
            f"{settings.model} is not the model that the plan was made with: it differs in "
            f"{', '.join(wrong)}"
        )
    return load(
        settings.model,
        method=settings.method,
        backbone=settings.backbone,
        revision=settings.revision,
        device=device,
        dtype=settings.dtype,
        max_length=settings.max_length,
        deterministic=settings.deterministic,
    )


class Worker:
    """Makes parts of a job, with one encoder.

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
        self._reader = CorpusReader(plan)
        first = index * len(plan.parts) // count
        self._order = plan.parts[first:] + plan.parts[:first]
        self._strict = strict
        self._on_texts = on_texts
        self._stall_timeout = stall_timeout
        self._claims = Claims(folder)

    def run(self) -> None:
        """Make parts until all of the job are there, also those of others that did not."""
        self.make(self._claimed())

    def make(self, parts: Iterable[Part]) -> None:
        """Make these parts. Raises what reading, embedding or writing does, naming the part."""
        read: deque[PartRows] = deque()
        settings = self._plan.settings

        def texts() -> Iterator[list[str]]:
            for part in parts:
                read.append(self._read(part))
                yield read[-1].texts

        self._alive()
        try:
            with ThreadPoolExecutor(1, "gen_fast-write") as writer:
                written: Future[None] | None = None
                blocks = self._encoder.encode_blocks(
                    texts(),
                    prompt=settings.prompt,
                    normalize_embeddings=settings.normalize,
                    truncate_dim=settings.truncate_dim,
                    on_progress=self._progress,
                )
                started = time.monotonic()
                for block in blocks:
                    if written is not None:
                        written.result()
                    now = time.monotonic()
                    written = writer.submit(
                        self._write,
                        read.popleft(),
                        block.embeddings,
                        block.truncated,
                        now - started,
                    )
                    started = now
                if written is not None:
                    written.result()
        except TextError as error:
            raise InputError(self._placed(read[-1], error.rows[0], error)) from error
        except NonFiniteError as error:
            raise NonFiniteError(self._placed(read[0], error.rows[0], error), ()) from error
        finally:
            if self._stall_timeout is not None:
                faulthandler.cancel_dump_traceback_later()

    def _claimed(self) -> Iterator[Part]:
        """Claim and yield parts until none is left that is neither finished nor claimed here."""
        left, mine = list(self._order), set()
        while True:
            left = [p for p in left if p.number not in mine and self._store.record(p) is None]
            if not left:
                return
            for part in left:
                if not self._claims.take(part.number):
                    continue
                if self._store.record(part) is not None:  # finished since it was looked at
                    self._claims.release(part.number)
                    continue
                mine.add(part.number)
                yield part
            if not mine.intersection(part.number for part in left):
                # Others are at work. If one of them ends without finishing, its part is free.
                self._alive()
                time.sleep(_POLL_SECONDS)

    def _read(self, part: Part) -> PartRows:
        read = self._reader.read(part)
        if self._strict and read.rejected:
            row = read.rejected[0]
            raise InputError(f"{row.input}, {row.place}: {row.kind}: {row.reason} (--strict)")
        return read

    def _write(
        self, read: PartRows, embeddings: np.ndarray, truncated: int, seconds: float
    ) -> None:
        try:
            record = self._store.write(read, embeddings, truncated)
        except OSError as error:
            raise JobError(
                f"cannot write {self._store.path(read.part)}: {error.strerror or error}; the "
                "finished parts are intact: run again when this is mended"
            ) from error
        except OverflowError as error:
            raise JobError(f"part {read.part.number}: {error}") from error
        self._claims.release(read.part.number)
        self._log(record, seconds)

    def _log(self, record: Record, seconds: float) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "part": record.part,
            "rows": record.rows,
            "rejected": len(record.rejected),
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
        self._alive()
        self._on_texts(texts)

    def _alive(self) -> None:
        """Put the end off for another stall_timeout.

        faulthandler's own thread needs no lock of Python's, so it also ends a process that hangs
        in a kernel or in the system.
        """
        if self._stall_timeout is not None:
            faulthandler.dump_traceback_later(
                self._stall_timeout, exit=True, file=sys.__stderr__ or sys.stderr
            )


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
    try:
        plan = Plan.load(options.folder)
        worker = Worker(
            options.folder,
            plan,
            load_encoder(plan.settings, options.device),
            index=options.index,
            count=options.count,
            strict=options.strict,
            stall_timeout=options.stall_timeout,
        )
        worker.run()
    except GenFastError as error:
        print(f"worker {options.index}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
