"""Files of tensors that cannot be read."""

from collections.abc import Callable
from pathlib import Path

import pytest


def assert_damage_is_refused(
    path: Path, load: Callable[[], object], error: type[Exception]
) -> None:
    """`load` refuses a file that is cut off, and that there is none, which remains so."""
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(error, match="damaged"):
        load()
    path.unlink()
    with pytest.raises(error, match="is missing"):
        load()
