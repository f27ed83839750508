"""Watchdog: ends a process that has made no progress for some time."""

import faulthandler
import sys
import time


class Watchdog:
    """Ends this process, with a traceback, after `seconds` without a heartbeat; None never does.

    A context manager, within which it counts. There is one in a process at a time.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._due = 0.0

    def heartbeat(self) -> None:
        """Put the end off for another `seconds`.

        faulthandler's own thread needs no lock of Python's, so it also ends a process that hangs
        in a kernel or in the system.
        """
        now = time.monotonic()
        if self._seconds is not None and now >= self._due:
            self._due = now + min(1.0, self._seconds / 4)  # each sets up a thread
            file = sys.__stderr__ or sys.stderr
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=file)

    def __enter__(self) -> "Watchdog":
        self.heartbeat()
        return self

    def __exit__(self, *_: object) -> None:
        self._due = 0.0
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()
