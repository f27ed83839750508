"""What the command asks of the C library's allocator."""

import os
import subprocess
import sys

import pytest

from gen_fast.cli import allocator
from gen_fast.cli.allocator import keep_freed_memory

# Page faults of batches after the first: three arrays of 16 MB, freed together.
FAULTS = """
import resource
import numpy as np
from gen_fast.cli.allocator import keep_freed_memory
{call}
def batch():
    return [np.ones(1 << 21) for _ in range(3)]
batch(), batch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    batch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

needs_glibc = pytest.mark.skipif(not allocator._is_glibc(), reason="another C library")


def faults(call: str) -> int:
    env = {k: v for k, v in os.environ.items() if k not in allocator._SETTINGS_OF_USERS}
    command = [sys.executable, "-c", FAULTS.format(call=call)]
    return int(subprocess.run(command, env=env, check=True, capture_output=True).stdout)


@needs_glibc
def test_the_next_batch_gets_what_the_last_one_freed():
    assert faults("keep_freed_memory()") < faults("") / 4


@pytest.mark.parametrize("name", allocator._SETTINGS_OF_USERS)
def test_what_the_environment_says_stays(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("was called"))
    keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    for name in allocator._SETTINGS_OF_USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.os, "confstr_names", {})
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: pytest.fail("was called"))
    keep_freed_memory()
