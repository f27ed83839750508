"""The harness itself: codes, streams and flips are what they are said to be."""

from pathlib import Path

from command_line import flips, gen_fast


def test_an_outcome_is_the_commands(tmp_path: Path) -> None:
    assert gen_fast("--version", cwd=tmp_path).succeeded().startswith("gen-fast ")
    gen_fast("info", "--model", "no/where/at-all", cwd=tmp_path).refused("no/where/at-all", code=4)
    assert list(tmp_path.iterdir()) == []


def test_flips_change_one_bit_and_are_undone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    for _ in flips(path, 100):
        changed = [a ^ b for a, b in zip(path.read_bytes(), b"abc", strict=True)]
        assert sum(x.bit_count() for x in changed) == 1
    assert path.read_bytes() == b"abc"
