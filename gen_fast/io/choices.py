"""Formats of text files and precisions of embeddings.

Imports nothing of ours, so that the command line starts at once.
"""

from typing import Literal, get_args

TextFormat = Literal["txt", "jsonl", "csv", "parquet"]
TEXT_FORMATS: tuple[TextFormat, ...] = get_args(TextFormat)

Precision = Literal["float32", "float16", "int8", "ubinary"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
