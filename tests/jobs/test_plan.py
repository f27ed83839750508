"""Plans: what is planned, what a plan refuses, and how it grows."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_corpus import (
    files_of,
    options,
    write_corpus,
)

from gen_fast.errors import InputError, JobError, PromptError
from gen_fast.jobs.job import embed_corpus
from gen_fast.jobs.plan import Plan
from gen_fast.jobs.settings import PlanSettings
from gen_fast.jobs.sources import list_sources
from gen_fast.jobs.verify import verify
from gen_fast.jobs.watchdog import Watchdog


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "tell: "}, r"prompt was 'say: ', now it is 'tell: '"),
        ({"precision": "float16"}, r"precision was 'float32', now it is 'float16'"),
        ({"truncate_dim": 8}, r"truncate_dim was None, now it is 8"),
        ({"max_length": 20}, r"max_length was None, now it is 20"),
        ({"rows_per_part": 17}, r"rows_per_part was 16, now it is 17"),
        ({"method": "last-token"}, r"identity\.method was 'mean', now it is 'last-token'"),
        ({"text_column": "title"}, r"text_column was 'text', now it is 'title'"),
    ],
)
def test_a_plan_that_does_not_match_is_refused(
    corpus: Path, tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    before = files_of(out)
    with pytest.raises(JobError, match=message):
        embed_corpus(corpus, out, **options(tiny_model, **changes))
    assert files_of(out) == before


def test_another_model_and_a_changed_input_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 40)
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    from gen_fast.testing import save_tiny_model

    save_tiny_model(tmp_path / "other", "llama-tied", seed=1)
    with pytest.raises(JobError, match=r"identity\.backbone\.embedding_sha256"):
        embed_corpus(corpus, out, **options(tmp_path / "other"))
    os.utime(corpus)  # the same content: nothing has changed
    embed_corpus(corpus, out, **options(tiny_model))
    corpus.write_text(corpus.read_text().replace("text number 3", "text number 4"))
    with pytest.raises(JobError, match=r"a\.jsonl has changed"):
        embed_corpus(corpus, out, **options(tiny_model))
    corpus.unlink()
    with pytest.raises((JobError, InputError), match=r"a\.jsonl"):
        embed_corpus(corpus, out, **options(tiny_model))


def test_inputs_are_added_behind_those_there_are(tiny_model: Path, tmp_path: Path) -> None:
    """What was embedded before stays as it is, and its ids come first."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_corpus(folder / "b.jsonl", 40)
    out = tmp_path / "out"
    embed_corpus(folder, out, **options(tiny_model))
    before = files_of(out)
    write_corpus(folder / "a.jsonl", 50, first=20)  # 20 of its ids are taken
    with pytest.raises(JobError, match=r"a\.jsonl is a new input \(--append adds it\)"):
        embed_corpus(folder, out, **options(tiny_model))
    summary = embed_corpus(folder, out, **options(tiny_model), append=True)
    assert summary is not None
    assert summary.rejected_by_kind["duplicate id"] == 20
    after = files_of(out)
    assert {name: after[name] for name in before if name.startswith("part")} == {
        name: content for name, content in before.items() if name.startswith("part")
    }
    assert verify(out) == []
    # The same command goes on without --append, and so does adding nothing.
    assert embed_corpus(folder, out, **options(tiny_model)) == summary
    assert embed_corpus(folder, out, **options(tiny_model), append=True) == summary


def test_until_there_is_a_part_settings_can_be_mended(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"id": "", "title": "a", "body": "b"}, {"id": "x", "title": "c", "body": "d"}]
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = options(tiny_model, text_column=None, id_column="id", prompt="x" * 600)
    with pytest.raises(InputError, match="several columns hold strings"):
        embed_corpus(corpus, tmp_path / "out", **settings)
    settings["text_column"] = "body"
    with pytest.raises(PromptError, match="leaves no room"):
        embed_corpus(corpus, tmp_path / "out", **settings)
    settings["prompt"] = ""
    summary = embed_corpus(corpus, tmp_path / "out", **settings)
    assert summary is not None
    assert summary.rejected_by_kind == {"missing id": 1}


def test_files_of_jobs_are_no_input(tiny_model: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", 20)
    settings = options(tiny_model)
    first = embed_corpus(tmp_path, tmp_path / "out", **settings)
    assert embed_corpus(tmp_path, tmp_path / "out", **settings, append=True) == first
    assert embed_corpus(tmp_path, tmp_path / "other", **settings) == first
    assert embed_corpus(f"{tmp_path}/**/*.*l*", tmp_path / "glob", **settings) == first
    # A job above the directory, or one that is given itself, hides nothing.
    (tmp_path / "sub").mkdir()
    write_corpus(tmp_path / "sub" / "b.jsonl", 20)
    embed_corpus(tmp_path / "a.jsonl", tmp_path, **settings)
    assert embed_corpus(tmp_path / "sub", tmp_path.with_name("below"), **settings) == first
    found = list_sources([f"{tmp_path}/out/*.parquet"], tmp_path / "new")
    assert found == [str(path) for path in sorted((tmp_path / "out").glob("part-*"))]


def test_a_plan_alone(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert embed_corpus(corpus, out, **options(tiny_model), plan_only=True) is None
    planned = (out / "plan.json").read_bytes()
    assert not list(out.glob("part-*"))
    embed_corpus(corpus, out, **options(tiny_model))
    assert (out / "plan.json").read_bytes() == planned


def test_planning_gives_signs_of_life(
    corpus: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While ids are sorted, and while the records and files of parts are read."""
    signs = []
    monkeypatch.setattr(Watchdog, "heartbeat", lambda self: signs.append(1))
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model), plan_only=True)
    assert len(signs) > 100  # 256 buckets, of which few are empty
    embed_corpus(corpus, out, **options(tiny_model))
    signs.clear()
    embed_corpus(corpus, out, **options(tiny_model), plan_only=True)
    assert len(signs) > 3 * 25  # each part: its record, its file, its rejected rows


def edit_in_secret(path: Path, old: str, new: str) -> None:
    """Change a text within a file, whose size and mtime stay as they are."""
    assert len(old) == len(new)
    state, content = path.stat(), path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_an_input_edited_at_its_size_and_mtime_is_noticed(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 40)
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    before = files_of(out)
    edit_in_secret(corpus, "text number 39", "text number 93")
    assert [line.split(" since")[0] for line in verify(out)] == [f"input {corpus} has changed"]
    (out / "part-00002.parquet").unlink()
    with pytest.raises(JobError, match=r"a\.jsonl has changed"):
        embed_corpus(corpus, out, **options(tiny_model))
    edit_in_secret(corpus, "text number 93", "text number 39")
    embed_corpus(corpus, out, **options(tiny_model))
    assert files_of(out) == before


def test_an_input_edited_during_a_run_is_noticed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 400)
    out = tmp_path / "out"
    load_encoder = PlanSettings.load_encoder

    def editing(self: PlanSettings, device: str) -> Any:
        edit_in_secret(corpus, "text number 399", "text number 939")
        return load_encoder(self, device)

    monkeypatch.setattr(PlanSettings, "load_encoder", editing)
    with pytest.raises(InputError, match=r"a\.jsonl has changed"):
        embed_corpus(corpus, out, **options(tiny_model))
    assert not (out / "_SUCCESS").exists()


def test_a_plan_is_sealed(tiny_model: Path, tmp_path: Path) -> None:
    """A plan that says less than was planned is refused, and how to go on is said."""
    corpus = write_corpus(tmp_path / "a.jsonl", 40)
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    before, path = files_of(out), out / "plan.json"
    text = path.read_text()
    for changed in (
        text.replace('"rows": 40', '"rows": 39').replace(", 8, 32, [", ", 7, 32, ["),
        text.replace('"normalize": false', '"normalize": true'),
        text.replace('"seal"', '"sea1"'),
        text[:-40],
        '{"format": ' * 100_000,
    ):
        assert changed != text
        path.write_text(changed)
        for use in (verify, lambda out: embed_corpus(corpus, out, **options(tiny_model))):
            with pytest.raises(JobError, match=r"plan\.json is not a readable plan.*delete it"):
                use(out)
    path.unlink()
    embed_corpus(corpus, out, **options(tiny_model))
    assert files_of(out) == before
    assert path.read_text() == text


def test_a_plan_of_before_seals_is_read(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "a.jsonl", 40)
    out = tmp_path / "out"
    embed_corpus(corpus, out, **options(tiny_model))
    before, path = files_of(out), out / "plan.json"
    old = json.loads(path.read_text())
    old["format"] = "gen_fast.jobs.plan/1"
    del old["seal"], old["inputs"][0]["changed"]
    path.write_text(json.dumps(old))
    assert verify(out) == []
    embed_corpus(corpus, out, **options(tiny_model))
    assert files_of(out) == before
    old["inputs"][0]["rows"] = 41
    path.write_text(json.dumps(old))
    with pytest.raises(JobError, match="its parts hold 40 of the 41 rows"):
        Plan.load(out)
    old["inputs"][0]["rows"] = 40
    old["parts"][1][4] = 15
    path.write_text(json.dumps(old))
    with pytest.raises(JobError, match="part 2 does not begin where the one before it ends"):
        Plan.load(out)


def test_unreadable_inputs(tiny_model: Path, tmp_path: Path) -> None:
    settings = options(tiny_model)
    for name, content, message in [
        ("none.jsonl", None, "no such file"),
        ("a.parquet", b"PAR1 but not really", "arquet"),
        ("a.doc", b"text", "names no format"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9999)[:-9], "cannot be read"),
    ]:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            embed_corpus(path, tmp_path / "out", **settings)
        assert not (tmp_path / "out" / "plan.json").exists()
