"""What commands print on stdout."""

import sys


def print_line(line: str) -> None:
    """As UTF-8 whatever the locale: ids and texts may be in any script."""
    sys.stdout.buffer.write(f"{line}\n".encode())
