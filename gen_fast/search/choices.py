"""Kinds of indexes.

Imports nothing of ours, so that the command line starts at once.
"""

from typing import Literal, get_args

Kind = Literal["flat", "hnsw", "int8", "binary", "ivfpq", "ondisk"]
KINDS: tuple[Kind, ...] = get_args(Kind)
