"""What commands print on stdout, and what happens where they cannot."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def print_line(line: str) -> None:
    """As UTF-8 whatever the locale: ids and texts may be in any script."""
    with named_stdout():
        sys.stdout.buffer.write(f"{line}\n".encode())


@contextmanager
def named_stdout() -> Iterator[None]:
    """Say of an OSError that it is stdout that cannot be written. A reader that stopped is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"stdout: cannot be written: {error.strerror}") from error


def discard_stdout() -> None:
    """Python flushes stdout once more when it exits: let that go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_missing_streams() -> None:
    """Put something in the place of standard streams that were closed, as by `>&-`.

    Else the next file that is opened would take their numbers. stdin and stdout are opened the
    wrong way round: who reads or writes them gets an error. What goes to stderr goes nowhere.
    """
    for name, flags, mode in (
        ("stdin", os.O_WRONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            # The lowest number that is free: that of the stream, as those before it are open.
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8"))
