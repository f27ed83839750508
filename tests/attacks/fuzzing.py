"""For hypothesis: few examples, always the same ones, or many new ones; and damage to files."""

from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FEW = settings(max_examples=60, deadline=None, derandomize=True)
MANY = settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# For a test that puts these settings, its argument, on what hypothesis is to check; many are slow.
few_or_many = pytest.mark.parametrize(
    "examples",
    [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)],
)


class Damage(NamedTuple):
    """Bytes to be written over a file's, by their places in 0..1, and how much of it stays."""

    patches: list[tuple[float, bytes]]
    length: float

    def done_to(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for where, piece in self.patches:
            start = int(where * len(content))
            changed[start : start + len(piece)] = piece
        return bytes(changed[: int(self.length * len(changed))])


def damages() -> st.SearchStrategy[Damage]:
    """Up to four places written over, and in some cases an end that is cut off."""
    patch = st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8))
    return st.builds(Damage, st.lists(patch, max_size=4), st.just(1.0) | st.floats(0, 1))
