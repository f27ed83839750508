"""JSON that may be damaged: whatever is wrong with it is a ValueError."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gen_fast.io.regular_files import check_regular


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises ValueError, naming the file, for bytes that are not UTF-8, text that is not JSON or is
    nested too deeply, and any value but an object; OSError if the file cannot be read, also for
    a pipe, from which reading would wait.
    """
    check_regular(path)
    content = path.read_bytes()
    try:
        value = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {_NAMES[type(value)]}, expected a JSON object")
    return value


def parse_json(text: str) -> Any:
    """The value that a JSON text says. Raises ValueError, also for one nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def seal(values: Mapping[str, Any]) -> str:
    """A checksum of an object but for its own field "seal", whatever its layout as text is."""
    unsealed = {name: value for name, value in values.items() if name != "seal"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def check_seal(values: Mapping[str, Any]) -> None:
    """Raise ValueError if an object is not what its seal was made of."""
    if values.get("seal") != seal(values):
        raise ValueError("it has changed since it was written (its seal is that of other content)")


_NAMES: dict[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}
