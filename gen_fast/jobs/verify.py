"""Whether a finished job is what its manifest says: files, checksums, rows, ids and values."""

from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gen_fast.errors import JobError
from gen_fast.io.choices import Precision
from gen_fast.io.durable import file_sha256
from gen_fast.io.json_files import parse_json
from gen_fast.io.tables import DATASETS
from gen_fast.jobs.parts import REJECTED, PartStore
from gen_fast.jobs.plan import MANIFEST, Part, Plan, change_of

_DTYPES: dict[Precision, type] = {
    "float32": np.float32,
    "float16": np.float16,
    "int8": np.int8,
    "ubinary": np.uint8,
}


def verify(folder: str | Path) -> list[str]:
    """Everything that is wrong with a finished job; empty if nothing is.

    Reads every part: its checksum against the manifest, dtype and size of the embeddings, that
    they are finite, that every row of the plan is there once, embedded or rejected, with an id.
    Names parts that the plan does not have, and inputs that have changed since (one that is gone
    is none: the job does not need it). Raises JobError if there is no finished job.
    """
    folder = Path(folder)
    store = PartStore(folder, Plan.load(folder))
    manifest = store.manifest()
    entries = manifest["parts"]
    if len(entries) != len(store.plan.parts):
        return [f"manifest.json lists {len(entries)} parts, plan.json has {len(store.plan.parts)}"]
    rejected, problems = _rejected(folder, manifest)
    with suppress(JobError, OSError):  # which are named below
        if manifest != store.expected_manifest():
            problems.append(f"{folder / MANIFEST} is not that of the parts")
    for part, entry in zip(store.plan.parts, entries, strict=True):
        problems += _problems(store, part, entry, rejected)
    problems += [f"{path} is no part of the plan: move it away" for path in store.strays()]
    return [*problems, *_changed_inputs(store.plan)]


def _changed_inputs(plan: Plan) -> Iterator[str]:
    for file in plan.inputs:
        if not file.path.startswith(DATASETS) and Path(file.path).exists():
            change = change_of(file, plan.settings)
            if change is not None:
                yield change


def _rejected(folder: Path, manifest: dict[str, Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The rejected rows of each input, ascending, and what is wrong with the list of them."""
    rows: dict[str, array[int]] = defaultdict(lambda: array("q"))
    path, problems = folder / REJECTED, []
    try:
        if file_sha256(path) != manifest["rejected_sha256"]:
            problems.append(f"{path} does not have its sha256")
        with path.open(encoding="utf-8") as file:
            for line in file:
                record = parse_json(line)
                rows[record["input"]].append(record["row"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        problems.append(f"{path} is damaged or missing: {error}")
    return {name: np.sort(np.array(found)) for name, found in rows.items()}, problems


def _problems(
    store: PartStore, part: Part, entry: dict[str, Any], rejected: dict[str, np.ndarray]
) -> Iterator[str]:
    path = store.path(part)
    record = store.record(part)
    if record is None or record.sha256 != entry["sha256"]:
        yield f"{path} is missing, cut off, or not the part that the manifest lists"
        return
    damage = store.damage(record)
    if damage is not None:
        yield damage
        return
    settings = store.plan.settings
    try:
        values, scales = store.stored(part)
        ids, rows = store.ids(part)
    except JobError as error:
        yield str(error)
        return
    width = -(-settings.dimension // 8) if settings.precision == "ubinary" else settings.dimension
    if values.dtype != _DTYPES[settings.precision] or values.shape != (entry["rows"], width):
        yield (
            f"{path} holds {values.dtype} of shape {values.shape}, expected "
            f"{np.dtype(_DTYPES[settings.precision])} of {(entry['rows'], width)}"
        )
    floats = values if scales is None else scales
    if not np.isfinite(floats).all():
        yield f"{path}: an embedding holds NaN or infinity"
    if settings.normalize_embeddings and settings.precision in ("float32", "float16"):
        lengths = np.linalg.norm(values.astype(np.float32), axis=1)
        # A zero vector stays zero.
        if not np.all((np.abs(lengths - 1) < 1e-2) | (lengths == 0)):
            yield f"{path}: an embedding does not have length 1"
    source = store.plan.inputs[part.input].path
    left_out = rejected.get(source, np.empty(0, np.int64))
    low, high = left_out.searchsorted([part.start.row, part.start.row + part.rows])
    left_out = left_out[low:high] - part.start.row + part.first
    expected = np.arange(part.first, part.first + part.rows)
    if (np.diff(rows) <= 0).any() or not np.array_equal(
        np.sort(np.concatenate([rows, left_out])), expected
    ):
        yield f"{path}: its rows and the rejected ones are not the {part.rows} of the plan"
    if len(set(ids)) != len(ids) or None in ids:
        yield f"{path}: an id is missing or there twice"
