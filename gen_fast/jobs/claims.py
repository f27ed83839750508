"""Which process works on which part: locks that the system releases when a process ends."""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from gen_fast.errors import JobError

logger = logging.getLogger(__name__)

CLAIMS = "_claims"
# The byte of who is planning or publishing; there are not so many parts.
PLANNING = 1 << 40
# The byte that all who work by the plan share.
IN_USE = PLANNING + 1
_POLL_SECONDS = 0.1
_TELL_SECONDS = 5.0


class Claims:
    """One byte of a file a part, locked by the process that works on it.

    POSIX record locks: they hold between machines where the file system passes them on (NFS does),
    end with the process, however it ends, and never bind the process that has them. Where they
    fail to exclude, a part is made twice, to the same bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / CLAIMS
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self, part: int) -> bool:
        """Claim a part; False if another process has it. Raises JobError without lock support."""
        return self._lock(fcntl.LOCK_EX, part)

    def share(self, part: int) -> bool:
        """Claim what others may share; False if another process has taken it. Raises as `take`."""
        return self._lock(fcntl.LOCK_SH, part)

    def _lock(self, kind: int, part: int) -> bool:
        try:
            fcntl.lockf(self._file, kind | fcntl.LOCK_NB, 1, part)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise JobError(
                f"{self._path}: this file system has no record locks ({error.strerror}), which "
                "several processes need to share a job"
            ) from error
        return True

    def wait(self, part: int, heartbeat: Callable[[], object] = lambda: None) -> None:
        """Claim what another process may still have, when it is free. Raises as `take` does.

        heartbeat: called while waiting.
        """
        began = time.monotonic()
        told = False
        while not self.take(part):
            heartbeat()
            time.sleep(_POLL_SECONDS)
            if not told and time.monotonic() - began > _TELL_SECONDS:
                told = True
                logger.warning("%s: waiting for another process to release it", self._path)

    def release(self, part: int) -> None:
        """Give a part back, finished or not."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, part)

    def close(self) -> None:
        """Give everything back."""
        os.close(self._file)
