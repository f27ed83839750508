"""What Linux tells of the processor."""

from pathlib import Path


def cpuinfo(field: str) -> str | None:
    """The first value of a field of /proc/cpuinfo, such as "model name"; None if not told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), None)
