"""Records the launches of Triton kernels instead of making them, so that no GPU is needed."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from gen_fast.ops import gpu


@dataclass(frozen=True)
class Launch:
    """One launch that was not made: what a compiler needs to know."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]


@contextmanager
def recorded(architecture: int, *, every_tile: bool = False) -> Iterator[list[Launch]]:
    """Collect launches, with the tiles of `architecture` (80, 90, …).

    every_tile: each pinned tile is a launch, not only the first.
    """
    launches: list[Launch] = []

    def launch(kernel, grid, *arguments, **constants):
        launches.append(Launch(kernel, arguments, constants))

    def launch_tiled(kernel, grid, tiles, key, *arguments, **constants):
        for tile in tiles if every_tile else tiles[:1]:
            launch(kernel, grid, *arguments, **constants, **tile.constants())

    with ExitStack() as stack:
        for name, replacement in (
            ("launch", launch),
            ("launch_tiled", launch_tiled),
            ("architecture", lambda device: architecture),
        ):
            stack.enter_context(mock.patch.object(gpu, name, replacement))
        yield launches
