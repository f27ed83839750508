"""Files that inputs name: what is left out is said, what cannot be read is an error."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gen_fast.errors import InputError
from gen_fast.jobs.sources import list_sources


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files, one of them below; and names that no format has."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jsonl", "sub/b.csv.gz", "notes.md", ".hidden.txt", "_x.txt"):
        (folder / name).write_text("text\n")
    return folder


def listed(source: object, out: Path) -> list[str]:
    return [Path(path).name for path in list_sources([str(source)], out)]


def test_links_are_followed_to_files_and_counted_else(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "linked.txt").write_text("text\n")
    (corpus / "linked.txt").symlink_to(tmp_path / "linked.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.txt").write_text("text\n")
    (corpus / "folder").symlink_to(tmp_path / "other")
    for name in ("gone.txt", "sub/lost.jsonl", "gone.md", ".gone.txt"):
        (corpus / name).symlink_to(tmp_path / "nowhere")
    (corpus / "loop.txt").symlink_to(corpus / "loop.txt")
    (corpus / "round").symlink_to(corpus)
    os.mkfifo(corpus / "pipe.txt")
    with caplog.at_level(logging.WARNING, "gen_fast"):
        assert listed(corpus, tmp_path / "out") == ["a.jsonl", "linked.txt", "b.csv.gz"]
    pipes, folders, nowhere = sorted(record.message for record in caplog.records)
    assert pipes.startswith(f"{corpus}: 1 left out (pipes, sockets or devices), such as ")
    assert f"2 left out (links to directories, which are not followed), such as {corpus}" in folders
    assert "3 left out (links that lead nowhere), such as" in nowhere
    assert f"{corpus / 'gone.txt'}" in nowhere


def test_a_link_that_leads_nowhere_is_counted_for_a_pattern(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (corpus / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING, "gen_fast"):
        assert listed(f"{corpus}/*.jsonl", tmp_path / "out") == ["a.jsonl"]
    (record,) = caplog.records
    assert record.message == (
        f"{corpus}/*.jsonl: 1 left out (links that lead nowhere), such as {corpus}/gone.jsonl"
    )


def test_nothing_is_said_where_nothing_is_left_out(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert listed(corpus, tmp_path / "out") == ["a.jsonl", "b.csv.gz"]
    assert not caplog.records


def test_a_loop_of_links_is_named_by_who_opens_it(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    assert listed(tmp_path / "loop.txt", tmp_path / "out") == ["loop.txt"]


@pytest.fixture
def unreadable() -> Iterator[Path]:
    """A directory with a subdirectory that others may not read. Not below root's own folders."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir()
        for path in (folder / "a.txt", folder / "closed" / "b.txt"):
            path.write_text("text\n")
        (folder / "closed").chmod(0)
        yield folder
        (folder / "closed").chmod(0o755)


def as_somebody(check: Callable[[], object]) -> int:
    """Run `check` in a process that root's rights do not help; 0 if it raised nothing."""
    process = os.fork()
    if process == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            check()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("pattern", ["", "/*/*.txt", "/**/*.txt"])
def test_a_subdirectory_that_cannot_be_read_is_an_error(unreadable: Path, pattern: str) -> None:
    def check() -> None:
        with pytest.raises(InputError, match="closed: cannot be read: Permission denied"):
            list_sources([f"{unreadable}{pattern}"], unreadable / "out")

    assert as_somebody(check) == 0
