"""What a caller may give as options of `encode`: their types, before anything is computed."""

from numbers import Integral
from typing import Any

import numpy as np

from gen_fast.errors import ConfigError

_FLAG = ((bool, np.bool_), "True or False")
_TEXT = ((str,), "a string")
_COUNT = ((Integral,), "a whole number")
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "prompt": _TEXT,
    "prompt_name": _TEXT,
    "normalize_embeddings": _FLAG,
    "precision": _TEXT,
    "truncate_dim": _COUNT,
    "batch_size": _COUNT,
    "show_progress_bar": _FLAG,
    "convert_to_numpy": _FLAG,
    "convert_to_tensor": _FLAG,
    "output_value": _TEXT,
    "max_length": _COUNT,
    "streams": _COUNT,
}
# Those that may be left to the model or the method.
_OR_NONE = (
    "prompt",
    "prompt_name",
    "truncate_dim",
    "batch_size",
    "show_progress_bar",
    "max_length",
    "streams",
)


def check_types(**options: Any) -> None:
    """Raise ConfigError naming the first option of a type that it never has."""
    for name, value in options.items():
        types, expected = _TYPES[name]
        if value is None and name in _OR_NONE:
            continue
        # A bool is an integer to Python, and no count of anything.
        is_flag = isinstance(value, bool | np.bool_)
        if not isinstance(value, types) or (is_flag and bool not in types):
            raise ConfigError(f"{name} must be {expected}, not {value!r:.60}")
