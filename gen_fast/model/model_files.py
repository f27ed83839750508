"""JSON files of a model's directory."""

from pathlib import Path
from typing import Any

from gen_fast.errors import WeightsError
from gen_fast.io.json_files import read_json_object


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises WeightsError if it is missing, damaged or cannot be read."""
    try:
        return read_json_object(path)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing") from error
    except ValueError as error:
        raise WeightsError(str(error)) from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
