"""Checkpoints of a run: written whole or not at all, and enough to go on to the same bits."""

import json
import logging
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen_fast.errors import AdapterError, CheckpointError, WeightsError
from gen_fast.io.checksums import damage, record_all
from gen_fast.io.durable import replacing_directory
from gen_fast.model.model_files import read_json

logger = logging.getLogger(__name__)

FORMAT = "gen_fast.checkpoint/2"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps, but for the trained tensors.

    optimizer: tensors by "<parameter>.<name>". identity: settings and data that must agree.
    counters: whatever else the loop counts.
    """

    step: int
    optimizer: Mapping[str, Tensor]
    identity: Mapping[str, Any]
    counters: Mapping[str, Any]


def save_checkpoint(
    folder: Path, checkpoint: Checkpoint, write_adapter: Callable[[Path], None], keep: int
) -> Path:
    """Write folder/step-00000100 and remove all but the newest `keep`.

    write_adapter: puts the trained tensors into a directory, in their own format.
    Everything lies under a temporary name and on the disk before it gets its own, so a crash or a
    full disk leaves the earlier checkpoints as they were. Raises CheckpointError.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    try:
        with replacing_directory(final) as temporary:
            write_adapter(temporary / "adapter")
            tensors = {name: tensor.contiguous() for name, tensor in checkpoint.optimizer.items()}
            save_file({**tensors, **_random_state()}, temporary / "optimizer.safetensors")
            state = {
                "format": FORMAT,
                "step": checkpoint.step,
                "identity": dict(checkpoint.identity),
                "counters": dict(checkpoint.counters),
                "python_random": random.getstate(),
                "numpy_random": [
                    x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()
                ],
            }
            (temporary / "state.json").write_text(json.dumps(state) + "\n")
            record_all(temporary)
    except (OSError, SafetensorError) as error:
        last = latest_checkpoint(folder)
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}; "
            + (f"{last} is intact: free some space and run again" if last else "there is none yet")
        ) from error
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`; None if there is none."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def load_checkpoint(
    path: Path, identity: Mapping[str, Any], read_adapter: Callable[[Path], None]
) -> Checkpoint:
    """Read a checkpoint and put the random generators where they were.

    read_adapter: takes the trained tensors over from their directory; called last.

    Raises CheckpointError if it is damaged, or belongs to other settings, data or backbone.
    """
    wrong = damage(path)
    if wrong is not None:
        raise _damaged(path, wrong)
    try:
        state = read_json(path / "state.json")
        tensors = load_file(path / "optimizer.safetensors")
        saved_identity = state["identity"]
        step, counters = int(state["step"]), state["counters"]
        saved_format = state["format"]
    except (WeightsError, SafetensorError, OSError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if saved_format != FORMAT:
        raise CheckpointError(f"{path} has format {saved_format!r}, expected {FORMAT!r}")
    # The hash of the data last: what else differs says more.
    for key in sorted({*saved_identity, *identity}, key=lambda key: (key == "data", key)):
        saved, now = saved_identity.get(key), identity.get(key)
        if saved != now:
            if isinstance(saved, dict) and isinstance(now, dict):
                parts = [part for part in {**saved, **now} if saved.get(part) != now.get(part)]
                key = f"{key}, {parts[0]}"
                saved, now = saved.get(parts[0]), now.get(parts[0])
            raise CheckpointError(
                f"{path} was trained with {key} = {saved!r}, this run has {now!r}: use the same "
                "settings, or another out directory"
            )
    try:
        read_adapter(path / "adapter")
    except AdapterError as error:
        raise _damaged(path, error) from error
    _set_random_state(state, tensors)
    optimizer = {name: t for name, t in tensors.items() if not name.startswith("random.")}
    return Checkpoint(step, optimizer, saved_identity, counters)


def _damaged(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {why}; delete it to use the one before")


def _checkpoints(folder: Path) -> list[Path]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in entries if re.fullmatch(r"step-\d+", path.name))


def _random_state() -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"random.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _set_random_state(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random.cpu"])
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("random.cuda.")]
    if len(cuda) == (torch.cuda.device_count() if torch.cuda.is_available() else 0) and cuda:
        torch.cuda.set_rng_state_all(cuda)
    version, internal, gauss = state["python_random"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy_random"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
