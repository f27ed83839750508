"""Values of a config.json, each of the type and size that its key must have.

`default` stands for a key that is missing or null; without one that is an error. Every error is an
UnsupportedModelError that names the key.
"""

import math
from collections.abc import Mapping
from typing import Any

from gen_fast.errors import UnsupportedModelError

# Larger than any model's sizes; their products still fit 64 bits.
_LARGEST = 2**31 - 1


def integer(
    values: Mapping[str, Any],
    key: str,
    default: int | None = None,
    *,
    least: int = 1,
    most: int = _LARGEST,
) -> int:
    """A whole number from `least` to `most`."""
    value = _present(values, key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _wrong(key, f"a whole number from {least} to {most}", value)
    return value


def positive(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above 0; an integer will do."""
    value = _present(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_usable(value):
        raise _wrong(key, "a finite number above 0", value)
    return float(value)


def _is_usable(value: float) -> bool:
    try:
        return value > 0 and math.isfinite(float(value))
    except OverflowError:  # an integer above every float
        return False


def flag(values: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false."""
    value = _present(values, key, default)
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def table(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; without one an empty one."""
    value = _present(values, key, {})
    if not isinstance(value, Mapping):
        raise _wrong(key, "an object", value)
    return value


def names(values: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings; without one an empty one."""
    value = _present(values, key, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _wrong(key, "a list of strings", value)
    return value


def _present(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    if value is not None:
        return value
    if default is None:
        raise UnsupportedModelError(f"config.json lacks the key {key!r}")
    return default


def _wrong(key: str, expected: str, value: object) -> UnsupportedModelError:
    return UnsupportedModelError(f"config.json: {key} must be {expected}, not {value!r:.60}")
