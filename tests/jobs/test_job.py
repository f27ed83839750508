"""What a job writes, and of which rows."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_corpus import (
    ROWS,
    files_of,
    options,
    write_corpus,
)

import gen_fast
from gen_fast.errors import ConfigError, InputError, JobError, PromptError, TextError
from gen_fast.io.embedding_files import read_embeddings
from gen_fast.jobs.job import embed_columns, embed_corpus
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Plan
from gen_fast.jobs.verify import verify


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parts_hold_what_encode_gives(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    summary = embed_corpus(corpus, tmp_path / "out", **options(tiny_model))
    bad = range(7, ROWS, 50)
    assert summary is not None
    assert (summary.rows, summary.rejected, summary.parts) == (ROWS - len(bad), len(bad), 25)
    assert summary.rejected_by_kind == {
        "NUL character": 2, "duplicate id": 1, "empty": 2, "missing id": 1, "no string": 2,
    }  # fmt: skip
    rejected = lines_of(tmp_path / "out" / "rejected.jsonl")
    assert [row["row"] for row in rejected] == list(bad)
    assert rejected[0] == {
        "input": str(corpus), "row": 7, "place": "line 8", "id": "k7", "kind": "empty",
        "reason": "there is nothing to embed",
    }  # fmt: skip

    encoder = gen_fast.load(tiny_model, dtype="float32", device="cpu")
    rows = [row for i, row in enumerate(lines_of(corpus)) if i not in bad]
    read = [read_embeddings(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [i for part in read for i in part.ids] == [row["key"] for row in rows]
    vectors = np.concatenate([part.vectors for part in read])
    alone = encoder.encode([row["text"] for row in rows], prompt="say: ")
    np.testing.assert_allclose(vectors, alone, rtol=1e-4, atol=1e-5)
    assert read[0].metadata is not None
    assert read[0].metadata.prompt == "say: "

    log = lines_of(tmp_path / "out" / "log.jsonl")
    assert [line["part"] for line in log] == list(range(25))
    assert sum(line["rows"] for line in log) == summary.rows


def test_texts_without_a_token_are_rejected(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only the method can tell: here it finds nothing of its own in every tenth text."""
    from gen_fast.embed import layouts

    layout = layouts.OwnTokens.__call__

    def picky(self: layouts.OwnTokens, texts: list[str], first_row: int) -> layouts.Sequences:
        bad = tuple(first_row + i for i, text in enumerate(texts) if "number 20 " in text)
        if bad:
            raise TextError(f"row {bad[0]} has no token of its own", bad)
        return layout(self, texts, first_row)

    monkeypatch.setattr(layouts.OwnTokens, "__call__", picky)
    corpus = write_corpus(tmp_path / "a.jsonl", 60)
    summary = embed_corpus(corpus, tmp_path / "out", **options(tiny_model))
    assert summary is not None
    assert summary.rejected_by_kind["no token"] == 1
    assert summary.rows == 60 - 3
    assert verify(tmp_path / "out") == []


def test_formats_directories_globs_and_templates(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    rows = [{"key": f"{i}", "title": f"t{i}", "year": i, "text": f"x{i}"} for i in range(30)]
    content = "".join(json.dumps(row) + "\n" for row in rows[:10])
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    csv = "key,title,year,text\n" + "".join(
        f"{row['key']},{row['title']},{row['year']},{row['text']}\n" for row in rows[10:20]
    )
    (folder / "b.csv").write_text(csv)
    pq.write_table(pa.Table.from_pylist(rows[20:]), folder / "sub" / "c.parquet")
    (folder / "_d.jsonl").write_text("{}\n")
    (folder / "notes.md").write_text("nothing")
    settings = options(tiny_model, text_column=None, template="{title} of {year}:\n{text}")
    settings["rows_per_part"] = 4
    embed_corpus(folder, tmp_path / "out", **settings)
    assert verify(tmp_path / "out") == []
    read = [read_embeddings(path) for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert [i for part in read for i in part.ids] == [row["key"] for row in rows]
    texts = [f"{row['title']} of {row['year']}:\n{row['text']}" for row in rows]
    alone = gen_fast.load(tiny_model, dtype="float32", device="cpu").encode(texts, prompt="say: ")
    vectors = np.concatenate([part.vectors for part in read])
    np.testing.assert_allclose(vectors, alone, rtol=1e-4, atol=1e-5)

    embed_corpus(f"{folder}/**/*.parquet", tmp_path / "glob", **settings)
    assert len(list((tmp_path / "glob").glob("*.parquet"))) == 3
    for wrong, message in [
        ("{titel}", "no column 'titel'"),
        ("{title.__class__}", "not the name of a column"),
        ("{0", "expected '}'"),
        ("title", "names no column"),
    ]:
        with pytest.raises((ConfigError, InputError), match=message):
            embed_corpus(folder, tmp_path / "wrong", **{**settings, "template": wrong})


def test_columns_with_prompts_of_their_own(tiny_model: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "in.jsonl", 60)
    settings = options(tiny_model)
    del settings["prompt"], settings["text_column"]
    prompts = {"title": "query", "text": "document"}
    # Beside their own input: neither job takes the parts of the other for some.
    summaries = embed_columns(tmp_path, tmp_path / "out", prompts, **settings)
    assert [summary and summary.rows for summary in summaries.values()] == [60, 58]
    for column, name in prompts.items():
        alone = tmp_path / f"{column} alone"
        embed_corpus(corpus, alone, **settings, text_column=column, prompt_name=name)
        assert files_of(tmp_path / "out" / column) == files_of(alone)
    assert embed_columns(tmp_path, tmp_path / "out", prompts, **settings) == summaries
    for columns in ({"../x": None}, {"n\0": None}, {"_x": None}):
        with pytest.raises(ConfigError, match="cannot name a directory"):
            embed_columns(corpus, tmp_path / "out", columns, **settings)
    with pytest.raises(ConfigError, match="no columns"):
        embed_columns(corpus, tmp_path / "out", {}, **settings)
    # What is wrong with the last column keeps the first from being embedded.
    with pytest.raises(PromptError, match="no prompt named 'documnet'"):
        embed_columns(corpus, tmp_path / "w", {"title": "query", "text": "documnet"}, **settings)
    assert not list((tmp_path / "w").rglob("part-*"))
    with pytest.raises(ConfigError, match="template is not for several"):
        embed_columns(corpus, tmp_path / "out", prompts, **settings, template="{title}")
    with pytest.raises(JobError, match="holds a job of one text a row"):
        embed_columns(corpus, alone, prompts, **settings)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "ubinary"])
def test_precisions_and_dimensions(
    corpus: Path, tiny_model: Path, tmp_path: Path, precision: Any
) -> None:
    from gen_fast.search.exact import nearest

    out = tmp_path / "out"
    settings = options(tiny_model, precision=precision, truncate_dim=40)
    embed_corpus(corpus, out, **settings, normalize_embeddings=True)
    assert verify(out) == []
    store = PartStore(out, Plan.load(out))
    stored = np.concatenate([store.embeddings(part) for part in store.plan.parts])
    texts = [r["text"] for i, r in enumerate(lines_of(corpus)) if i % 50 != 7]
    exact = gen_fast.load(tiny_model, dtype="float32", device="cpu").encode(
        texts, prompt="say: ", truncate_dim=40, normalize_embeddings=True
    )
    assert isinstance(exact, np.ndarray)
    if precision == "ubinary":
        np.testing.assert_array_equal(stored, np.where(exact > 0, 1, -1))
    else:
        bound = {"float32": 1e-5, "float16": 1e-3, "int8": np.abs(exact).max() / 250}[precision]
        assert np.abs(stored - exact).max() <= bound
        assert (nearest(stored, exact, 1)[0] > 0.999).all()


def test_strict_stops_at_a_bad_row(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    for devices in (None, "cpu,cpu"):
        with pytest.raises((InputError, JobError), match=r"line 8: empty|exit code 1"):
            embed_corpus(
                corpus, tmp_path / f"out{devices}", **options(tiny_model), strict=True,
                devices=devices,
            )  # fmt: skip


def test_bad_rows_of_every_format(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe\n\na\0b\n" + b"x" * 2000 + b"\ngood\n")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "good"}\n{"text": \n["good"]\n{"text": "\\ud800"}\n'
    )
    settings = options(tiny_model, id_column=None, text_column=None, max_text_bytes=1000)
    summary = embed_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "o", **settings)
    assert summary is not None
    assert summary.rows == 3
    assert summary.rejected_by_kind == {
        "NUL character": 1, "empty": 1, "too long": 1, "unreadable": 4,
    }  # fmt: skip
    read = [read_embeddings(path).ids for path in sorted((tmp_path / "o").glob("*.parquet"))]
    assert read == [["0", "5"], ["6"]], "rows are numbered over the job"


def test_the_command(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from gen_fast.cli import app

    def run(*arguments: object) -> Any:
        model = ["--model", tiny_model, "--dtype", "float32"]
        return CliRunner().invoke(app, [str(a) for a in ("embed", corpus, *model, *arguments)])

    columns = ["--text-column", "text", "--id-column", "key"]
    done = run("--out", tmp_path / "out", *columns, "--normalize", "--precision", "int8")
    assert done.exit_code == 0, done.stderr
    assert "392 embeddings in 1 parts; 8 rows rejected (2 NUL character, 1 duplicate" in done.stderr
    assert done.stdout == ""
    for arguments, code, message in [
        ([*columns], 1, "precision was 'int8', now it is 'float32'"),
        (["--truncate-dim", 99], 2, "outside 1…48"),
        (["--template", "{a", "--id-column", "key"], 2, "template"),
        (["--text-column", "text", "--template", "{a}"], 2, "not both"),
        (["--devices", "cpu,tpu9"], 2, "device 'tpu9'"),
        (["--prompt-name", "answer"], 2, "no prompt named 'answer'"),
        (["--text-column", "text", "--text-column", "text"], 2, "each --text-column once"),
        (["--prompt-name", "query", "--prompt-name", "document"], 2, "one --prompt-name for all"),
        (["--text-column", "a", "--text-column", "b", "--prompt", "x"], 2, "by --prompt-name"),
    ]:
        failed = run("--out", tmp_path / "out", *arguments)
        assert failed.exit_code == code, (arguments, failed.stderr, failed.exception)
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1

    two = ["--text-column", "title", "--text-column", "text", "--id-column", "key"]
    done = run("--out", tmp_path / "two", *two, "--prompt-name", "query")
    assert done.exit_code == 0, done.stderr
    assert [line.split(";")[0] for line in done.stderr.splitlines()] == [
        "title: 398 embeddings in 1 parts",
        "text: 392 embeddings in 1 parts",
    ]
    assert verify(tmp_path / "two" / "text") == []


def test_settings_whole_or_by_name(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    by_name = options(tiny_model, precision="int8")
    settings = gen_fast.Settings(**by_name)
    embed_corpus(corpus, tmp_path / "whole", settings)
    embed_corpus(corpus, tmp_path / "named", **by_name)
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "named")
    # A name takes the place of the setting, and of what excludes it.
    embed_corpus(corpus, tmp_path / "other", settings, prompt_name="query", plan_only=True)
    assert Plan.load(tmp_path / "other").settings.prompt == ""
    embed_corpus(corpus, tmp_path / "both", settings, template="{title}: {text}", plan_only=True)
    assert Plan.load(tmp_path / "both").settings.text_column is None
    with pytest.raises(TypeError, match="no_such_setting"):
        embed_corpus(corpus, tmp_path / "none", settings, no_such_setting=1)
    with pytest.raises(ConfigError, match="text_column is not for several columns"):
        embed_columns(corpus, tmp_path / "columns", {"text": None}, settings)


def test_names_in_the_plan_are_a_format(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    embed_corpus(corpus, tmp_path / "out", **options(tiny_model), plan_only=True)
    names = json.loads((tmp_path / "out" / "plan.json").read_text())["settings"]
    assert list(names) == [
        "model",
        "method",
        "backbone",
        "revision",
        "dtype",
        "max_length",
        "deterministic",
        "prompt",
        "normalize",
        "truncate_dim",
        "precision",
        "text_column",
        "id_column",
        "template",
        "file_format",
        "split",
        "max_text_bytes",
        "rows_per_part",
        "identity",
    ]
