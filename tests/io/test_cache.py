"""A directory of the cache: whole, checked, healed, readable by others, or a clear error."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_corpus import processes

from gen_fast.errors import CacheError
from gen_fast.io.cache import cached_directory
from gen_fast.io.checksums import CHECKSUMS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEN_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path) -> None:
    (folder / "a").write_text("text of a")
    (folder / "b").write_bytes(bytes(100_000))


def refuse(folder: Path) -> None:
    pytest.fail(f"{folder} was made again")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_is_made_once(cache: Path) -> None:
    made = cached_directory("key", write)
    assert made == cache / "key"
    assert sorted(contents(made)) == ["a", "b", CHECKSUMS]
    assert cached_directory("key", refuse) == made


@pytest.mark.parametrize("what", ["changed", "truncated", "missing", "stray", "unlisted", "list"])
def test_what_is_not_as_it_was_is_made_again(
    cache: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    made = cached_directory("key", write)
    expected = contents(made)
    with (made / "a").open("rb") as in_use:
        if what == "changed":
            (made / "a").write_text("text of b")
        elif what == "truncated":
            os.truncate(made / "b", 50_000)
        elif what == "missing":
            (made / "a").unlink()
        elif what == "stray":
            (made / "c").touch()
        elif what == "unlisted":  # as earlier versions left it
            (made / CHECKSUMS).unlink()
        else:
            (made / CHECKSUMS).write_text("{}")
        assert cached_directory("key", write) == made
        assert "it is made again" in caplog.text
        assert contents(made) == expected
        assert in_use.read()  # who has it open reads on
    assert [path.name for path in cache.iterdir() if path.name != "remembered"] == ["key"]


def test_other_users_can_read_it(cache: Path) -> None:
    before = os.umask(0o022)
    made = cached_directory("key", write)
    os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o644}


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit of the process on file sizes fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk(cache: Path) -> None:
    with pytest.raises(CacheError, match=r"key cannot be written: .*too large"):
        cached_directory("key", write)
    assert list(cache.iterdir()) == []


def test_a_cache_that_is_a_file(cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(CacheError, match="key cannot be written"):
        cached_directory("key", write)


def test_a_copy_that_another_process_has_made_meanwhile_serves(cache: Path) -> None:
    """It may be in use: it is not replaced by the same once more."""
    states = []

    def late(folder: Path) -> None:
        write(folder)
        made = cached_directory("key", write)
        states.append(made.stat().st_ino)

    assert [cached_directory("key", late).stat().st_ino] == states


def test_processes_that_make_it_at_once_agree(cache: Path) -> None:
    running = [processes.Process(target=_make, args=(cache,)) for _ in range(6)]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [0] * 6
    assert cached_directory("key", refuse) == cache / "key"
    assert [path.name for path in cache.iterdir() if path.name != "remembered"] == ["key"]


def _make(cache: Path) -> None:
    os.environ["GEN_FAST_CACHE"] = str(cache)
    assert (cached_directory("key", write) / "a").read_text() == "text of a"
