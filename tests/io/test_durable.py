"""States of files: what counts as a change, and when a file has to be read to tell."""

import os
from pathlib import Path

import pytest

from gen_fast.io import durable
from gen_fast.io.durable import file_state, has_changed


def test_a_file_is_read_only_if_its_times_leave_a_change_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "file", []
    path.write_bytes(b"abc")
    young = file_state(path)
    assert young.changed is None
    assert not has_changed(path, young, reads.append)
    assert reads == [3], "an edit at once could have the same times"

    monkeypatch.setattr(durable, "_SETTLED_NANOSECONDS", 0)
    old = file_state(path)
    reads.clear()
    assert not has_changed(path, old, reads.append)
    assert reads == []
    path.touch()
    assert not has_changed(path, old, reads.append)
    assert reads == [3]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"abd")
    os.utime(path, ns=times)
    assert has_changed(path, old)
    reads.clear()
    path.write_bytes(b"abcd")
    assert has_changed(path, old, reads.append)
    assert reads == []


def test_a_file_that_changes_while_it_is_read_has_no_state(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with pytest.raises(OSError, match="changed while it was read"):
        file_state(path, lambda _: path.write_bytes(b"abcd"))
