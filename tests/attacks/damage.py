"""What becomes of flipped bits: each is refused, healed or harmless, or it is a bug."""

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import flips

from gen_fast.errors import GenFastError

_OUTCOMES = ("refused", "healed", "harmless", "silent", "traceback")


@dataclass
class Tally:
    """How the flips of one kind of file ended, and where those that are bugs were."""

    kind: str
    counts: Counter[str] = field(default_factory=Counter)
    bugs: list[str] = field(default_factory=list)

    def row(self) -> str:
        """As a line of docs/trust.md."""
        cells = [self.counts.total(), *(self.counts[outcome] for outcome in _OUTCOMES)]
        return f"| {self.kind} | {' | '.join(map(str, cells))} |"


def flipped(kind: str, path: Path, count: int, outcome: Callable[[], str], start: int = 0) -> Tally:
    """Flip bits of a file from byte `start` on, and ask each time how it ends: "refused", …

    An error of gen_fast that `outcome` raises is a refusal, any other one a traceback.
    """
    tally = Tally(kind)
    for place in flips(path, count, start=start):
        try:
            ended = outcome()
        except GenFastError:
            ended = "refused"
        except Exception:  # noqa: BLE001  # a user would see it as a traceback
            ended = "traceback"
            tally.bugs.append(f"{place}: {traceback.format_exc()}")
        if ended == "silent":
            tally.bugs.append(f"{place}: silent")
        tally.counts[ended] += 1
    print(tally.row())
    return tally


def refusal(action: Callable[[], Any]) -> str | None:
    """The error of gen_fast that an action ends with, if it does."""
    try:
        action()
    except GenFastError as error:
        return str(error)
    return None
