"""Engines and defaults of a job.

Imports nothing of ours, so that the command line starts at once.
"""

from typing import Literal, get_args

EngineName = Literal["local", "ray"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

DEFAULT_ROWS_PER_PART = 8192
DEFAULT_MAX_TEXT_BYTES = 1_000_000
DEFAULT_SPLIT = "train"
# Seconds without progress after which a process ends itself.
DEFAULT_STALL_TIMEOUT = 600.0
LONGEST_STALL_TIMEOUT = 31_536_000.0  # a year; the system's timers end somewhere above it
