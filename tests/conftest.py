"""Models that tests share. Whatever is slow to make is made once a session."""

import gc
import os

# Until all tests are collected: modules stay, and the collector would look through them again and
# again while more are imported.
if gc.isenabled():
    gc.disable()

if (workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT")) is not None:
    # Before torch is imported: the workers share the cores, and so do the processes they start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
    # A thread that waits for another leaves its core to the other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    # Before Triton is imported: its kernels then run on the CPU, one tile at a time.
    os.environ.setdefault("TRITON_INTERPRET", "1")


import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from faster_interpreter import faster_interpreter
from filelock import FileLock

import gen_fast
from gen_fast.errors import ModelNotFoundError
from gen_fast.model.sources import resolve
from gen_fast.ops import native
from gen_fast.ops.native import Isa
from gen_fast.testing import instructions_up_to, save_tiny_model

if (emulated := os.environ.get("GEN_FAST_EMULATED")) is not None:
    # The modules of `make emulated` instead of the installed ones.
    gen_fast.__path__.insert(0, os.path.join(os.path.realpath(emulated), "gen_fast"))

MadeOnce = Callable[[str, Callable[[Path], Any]], Any]


def pytest_collection_finish() -> None:
    # What there is by now, modules mostly, stays: the collector need not look at it ever again, and
    # less often at what tests leave.
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 50)
    gc.enable()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> MadeOnce:
    """made_once(name, make): the JSON that make(folder) gives, by whichever process comes first."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def made(name: str, make: Callable[[Path], Any]) -> Any:
        folder = shared / f"made-{name}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                (folder / "made.json").write_text(json.dumps(make(folder)))
        return json.loads((folder / "made.json").read_text())

    return made


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> Iterator[None]:
    """Triton's, faster: the tests of Triton kernels spend most of their time in it."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    with faster_interpreter():
        yield


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """The commands set the level of their whole process, which here other tests share."""
    logger = logging.getLogger("gen_fast")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def nan_in_fresh_memory() -> Iterator[None]:
    """What torch.empty and its kin give holds NaN, or the largest integer.

    Else a result that nobody wrote may pass: a reused allocation often holds the right numbers.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer; milliseconds to load and run."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_model(directory, "llama-tied")
    return directory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct with its real weights."""
    try:
        return resolve("smollm2-135m")
    except ModelNotFoundError as error:
        pytest.fail(f"the tests need the demo model (make test installs it): {error}")


@pytest.fixture(scope="session")
def smollm2_encoder(smollm2: Path) -> gen_fast.Encoder:
    """SmolLM2 with mean pooling in float32."""
    return gen_fast.load(smollm2, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def fp8_by_the_reference() -> Iterator[None]:
    """fp8 in plain torch, for the tests of a module that uses this: a CPU does not compute it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gen_fast.ops.FORCED", "cpu,reference")
        yield


def _each(*isas: Isa) -> dict[str, Any]:
    return {"params": isas, "ids": [isa.name.lower().replace("_", "-") for isa in isas]}


@pytest.fixture(scope="session")
def run_by_hardware(made_once: MadeOnce) -> list[Isa]:
    """In `make emulated`: what the installed C++ ops run here, as make test has them do; else none.

    Asked of them: a processor may have what the system refuses, as AMX's tiles.
    """
    if emulated is None:
        return []
    script = """
import json
from gen_fast.ops import native
from gen_fast.testing import instructions_up_to
found = []
for isa in native.Isa:
    with instructions_up_to(isa):
        found += [isa] if native.isa() == isa else []
print(json.dumps(found))
"""

    def asked(_: Path) -> Any:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return [Isa(number) for number in made_once("run_by_hardware", asked)]


@pytest.fixture(**_each(Isa.BASELINE, Isa.AVX2, Isa.AVX512))
def isa(request: pytest.FixtureRequest, run_by_hardware: list[Isa]) -> Iterator[None]:
    """Runs the C++ ops with each instruction set that this processor has."""
    yield from _up_to(request.param, run_by_hardware)


@pytest.fixture(**_each(Isa.BASELINE, Isa.AVX2, Isa.AVX512, Isa.AMX))
def isa_or_amx(request: pytest.FixtureRequest, run_by_hardware: list[Isa]) -> Iterator[None]:
    """The same for an op that has a version of its own for AMX."""
    yield from _up_to(request.param, run_by_hardware)


@pytest.fixture(**_each(Isa.BASELINE, Isa.AVX2, Isa.AVX2_VNNI, Isa.AVX512_VNNI, Isa.AVX512))
def isa_or_vnni(request: pytest.FixtureRequest, run_by_hardware: list[Isa]) -> Iterator[None]:
    """The same for an op that has versions of its own for VNNI without bfloat16."""
    yield from _up_to(request.param, run_by_hardware)


def _up_to(isa: Isa, run_by_hardware: list[Isa]) -> Iterator[None]:
    if native.missing() is not None:
        pytest.skip(f"the C++ extension {native.missing()}")
    if isa in run_by_hardware:
        pytest.skip("make test runs it on this processor")
    with instructions_up_to(isa):
        if native.isa() != isa:
            pytest.skip("not on this processor")
        yield
