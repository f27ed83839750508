"""JSON objects with a checksum of themselves, so that a changed one is noticed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with their checksum, which stands under "seal"."""
    rest = {key: value for key, value in values.items() if key != SEAL}
    return {**rest, SEAL: _checksum(rest)}


def has_seal(values: Mapping[str, Any]) -> bool:
    """Whether values have a checksum, and it is theirs."""
    return bool(values.get(SEAL) == sealed(values)[SEAL])


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
