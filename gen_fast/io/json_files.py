"""JSON that may be damaged: whatever is wrong with it is a ValueError."""

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises ValueError, naming the file, for bytes that are not UTF-8, text that is not JSON or is
    nested too deeply, and any value but an object; OSError if the file cannot be read.
    """
    content = path.read_bytes()
    try:
        value = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {_NAMES[type(value)]}, expected a JSON object")
    return value


def parse_json(text: str) -> Any:
    """The value that a JSON text says. Raises ValueError, also for one nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


_NAMES: dict[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}
