"""What becomes of a command when a file was damaged: refused, or the result as it was."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from command_line import flips

from gen_fast.errors import GenFastError


@dataclass(frozen=True)
class Tally:
    """Of so many flips of one bit in a file: refused by an error of gen_fast, or without effect."""

    file: str
    flips: int
    refused: int

    @property
    def same(self) -> int:
        """The result was the one of the whole file: it was healed, or the bit says nothing."""
        return self.flips - self.refused

    def __str__(self) -> str:
        return f"| {self.file} | {self.flips} | {self.refused} | {self.same} |"


def attack(file: str, path: Path, count: int, act: Callable[[], object], seed: int = 0) -> Tally:
    """Flip bits of a file, and `act` after each: it gives what it gave before, or a GenFastError.

    Prints a row of the table in docs/trust.md.
    """
    expected = act()
    done = refused = 0
    for where in flips(path, count, seed):
        done += 1
        try:
            result = act()
        except GenFastError:
            refused += 1
        else:
            assert result == expected, f"{where}: another result in silence"
    tally = Tally(file, done, refused)
    print(tally)
    return tally
