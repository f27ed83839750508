"""The command line as a user meets it: files, exit codes, stdout and stderr."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import gen_fast
from gen_fast.cli import app
from gen_fast.cli.options import Method
from gen_fast.embed.choices import (
    GEM,
    LLM2VEC,
    LLM2VEC_BARE,
    LLM2VEC_GEN,
    METHODS,
    SENTENCE_TRANSFORMERS,
)
from gen_fast.embed.methods import TRAINING_FREE
from gen_fast.io.embedding_files import read_embeddings, write_embeddings
from gen_fast.ops import native
from gen_fast.testing import save_tiny_model

TEXTS = ["the cat sat", "naïve café ☕", "日本語の文", "a", "a much longer text " * 5, "the end"]
# The script beside the interpreter: the one this environment installed.
SCRIPT = Path(sys.executable).parent / "gen-fast"


def run(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)


def done(*arguments: object, stdin: str | None = None) -> str:
    """Run, expect success, return stdout."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def fails(code: int, *arguments: object, stdin: str | None = None) -> str:
    """Run, expect this exit code, one line on stderr and an empty stdout; return the line."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("gen-fast: error: ")
    return lines[0]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def expected(tiny_model: Path) -> np.ndarray:
    return np.asarray(gen_fast.load(tiny_model, device="cpu", dtype="float32").encode(TEXTS))


@pytest.fixture
def options(tiny_model: Path) -> list[object]:
    return ["--model", tiny_model, "--device", "cpu", "--dtype", "float32", "--quiet"]


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_encode_writes_the_encoders_embeddings_in_order(
    corpus: Path, options: list[object], expected: np.ndarray, suffix: str
) -> None:
    out = corpus.with_suffix(suffix)
    assert done("encode", corpus, "--out", out, *options) == ""
    read = read_embeddings(out)
    np.testing.assert_allclose(read.vectors, expected, rtol=1e-5, atol=1e-6)
    assert read.ids == [str(i) for i in range(len(TEXTS))]
    assert read.texts == (None if suffix == ".npy" else TEXTS)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_encode_reads_columns(
    tmp_path: Path, options: list[object], expected: np.ndarray, suffix: str
) -> None:
    rows = [{"name": f"é{i}", "body": text} for i, text in enumerate(TEXTS)]
    path = tmp_path / f"in{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        lines = ["name,body", *(f"{row['name']},{row['body']}" for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    columns = ["--text-column", "body", "--id-column", "name"]
    out = tmp_path / "out.parquet"
    done("encode", path, "--out", out, *columns, *options)
    read = read_embeddings(out)
    assert read.ids == [row["name"] for row in rows]
    assert read.texts == TEXTS
    np.testing.assert_allclose(read.vectors, expected, rtol=1e-5, atol=1e-6)


def test_stdin_to_stdout(options: list[object], expected: np.ndarray) -> None:
    records = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    for given, extra in (("\n".join(TEXTS), []), (records, ["--format", "jsonl"])):
        out = done("encode", "-", "--out", "-", *extra, *options, stdin=given)
        rows = [json.loads(line) for line in out.splitlines()]
        assert [row["id"] for row in rows] == [str(i) for i in range(len(TEXTS))]
        vectors = [row["embedding"] for row in rows]
        np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)


def test_an_empty_file_gives_an_empty_result(tmp_path: Path, options: list[object]) -> None:
    (tmp_path / "none.txt").touch()
    out = tmp_path / "out.parquet"
    done("encode", tmp_path / "none.txt", "--out", out, *options)
    assert read_embeddings(out).vectors.shape == (0, 48)
    assert done("search", out, "anything", "--quiet") == ""


def test_metadata_says_how(corpus: Path, tiny_model: Path, options: list[object]) -> None:
    out = corpus.with_suffix(".safetensors")
    done(
        "encode",
        corpus,
        "--out",
        out,
        "--method",
        "weighted-mean",
        "--prompt",
        "Say: ",
        "--normalize",
        "--truncate-dim",
        "16",
        *options,
    )
    read = read_embeddings(out)
    assert read.metadata is not None
    assert read.metadata.model == str(tiny_model.resolve())
    assert read.metadata.method == "weighted-mean"
    assert read.metadata.prompt == "Say: "
    assert (read.metadata.dimension, read.metadata.model_dimension) == (16, 48)
    assert read.metadata.dtype == "float32"
    assert read.metadata.normalized
    np.testing.assert_allclose(np.linalg.norm(read.vectors, axis=1), 1, rtol=1e-5)
    encoder = gen_fast.load(tiny_model, method="weighted-mean", device="cpu", dtype="float32")
    direct = encoder.encode(TEXTS, prompt="Say: ", normalize_embeddings=True, truncate_dim=16)
    np.testing.assert_allclose(read.vectors, direct, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("extra", [[], ["--normalize"], ["--truncate-dim", "16"]])
@pytest.mark.parametrize("center", [[], ["--center"]])
def test_search_finds_the_same_text_first(
    corpus: Path, options: list[object], extra: list[str], center: list[str]
) -> None:
    out = corpus.with_suffix(".parquet")
    done("encode", corpus, "--out", out, *extra, *options)
    # Neither model nor method: the file says them.
    found = done("search", out, *TEXTS, "-k", "2", "--dtype", "float32", "--device", "cpu", *center)
    blocks = [block.splitlines() for block in found.split("\n\n")]
    assert len(blocks) == len(TEXTS)
    for row, (block, text) in enumerate(zip(blocks, TEXTS, strict=True)):
        assert len(block) == 2
        score, identifier, content = block[0].split("\t")
        assert (identifier, content) == (str(row), text.strip())
        assert float(score) == pytest.approx(1, abs=2e-4)


def test_search_scores_are_cosines_and_center_subtracts_the_mean(
    corpus: Path, options: list[object], expected: np.ndarray
) -> None:
    out = corpus.with_suffix(".npy")
    done("encode", corpus, "--out", out, *options)
    for center in (False, True):
        base = expected - expected.mean(0) if center else expected
        unit = base / np.linalg.norm(base, axis=1, keepdims=True)
        cosines = unit @ unit[2]
        flags = ["--json", *(["--center"] if center else [])]
        found = json.loads(done("search", out, TEXTS[2], *flags, *options))
        assert found["query"] == TEXTS[2]
        results = found["results"]
        assert [int(r["id"]) for r in results] == np.argsort(-cosines).tolist()
        scores = [r["score"] for r in results]
        np.testing.assert_allclose(scores, np.sort(cosines)[::-1], atol=1e-4)


def test_search_npy_takes_texts_and_queries_from_files(corpus: Path, options: list[object]) -> None:
    out = corpus.with_suffix(".npy")
    done("encode", corpus, "--out", out, *options)
    queries = corpus.with_name("queries.csv")
    queries.write_text(f"kind,q\nx,{TEXTS[1]}\n", encoding="utf-8")
    extra = ["--queries", queries, "--query-column", "q", "-k", "1", *options]
    assert done("search", out, *extra).split("\t")[1:] == ["1", "\n"]
    assert done("search", out, *extra, "--texts", corpus).split("\t")[2] == f"{TEXTS[1]}\n"
    short = corpus.with_name("short.txt")
    short.write_text("one\n")
    assert "short.txt" in fails(3, "search", out, "q", "--texts", short, *options)
    # npy does not say its model.
    assert "--model" in fails(2, "search", out, "q")


def test_search_prints_one_line_for_a_text_of_several(
    tmp_path: Path, options: list[object]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "two\nlines\tand a tab"}))
    done("encode", path, "--out", tmp_path / "out.parquet", *options)
    found = done("search", tmp_path / "out.parquet", "two", *options)
    assert found.split("\t")[1:] == ["0", "two lines and a tab\n"]


def test_search_refuses_another_model(corpus: Path, options: list[object]) -> None:
    path = corpus.with_suffix(".npy")
    np.save(path, np.ones((2, 7), np.float32))
    error = fails(3, "search", path, "q", *options)
    assert "not the same model" in error
    assert "dimension 7 (file) vs 48 (model)" in error


def test_search_names_the_difference_between_models_of_one_shape(
    corpus: Path, tmp_path: Path, options: list[object]
) -> None:
    out = corpus.with_suffix(".parquet")
    done("encode", corpus, "--out", out, *options)
    other = tmp_path / "other"
    save_tiny_model(other, "llama-tied", seed=1)
    error = fails(3, "search", out, "q", "--model", other, "--device", "cpu", "--quiet")
    assert "not the same model" in error
    assert "embedding_sha256" in error
    assert "vocab_size" not in error
    # A file from before fingerprints were stored is taken at its word.
    read = read_embeddings(out)
    assert read.metadata is not None
    old = replace(read, metadata=replace(read.metadata, fingerprint={}))
    write_embeddings(out, old)
    done("search", out, "q", "--model", other, "--device", "cpu", "--quiet")


def test_bad_input_names_file_and_row(tmp_path: Path, options: list[object]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": \n')
    out = ["--out", tmp_path / "out.npy"]
    error = fails(3, "encode", bad, *out, *options)
    assert "bad.jsonl, line 2" in error
    assert "missing.txt" in fails(3, "encode", tmp_path / "missing.txt", *out, *options)
    assert "title" in fails(3, "encode", bad, *out, "--text-column", "title", *options)
    assert "stdin, line 1" in fails(
        3, "encode", "-", "--format", "jsonl", *out, *options, stdin="{\n"
    )
    assert os.listdir(tmp_path) == ["bad.jsonl"]
    gap = tmp_path / "gap.txt"
    gap.write_text("one\n\nthree\n")
    assert "gap.txt: row 1" in fails(3, "encode", gap, *out, *options)


def test_model_problems(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out.npy"]
    missing = tmp_path / "no-such-model"
    assert "no-such-model" in fails(4, "encode", corpus, *out, "--model", missing)
    damaged = shutil.copytree(tiny_model, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    fails(4, "encode", corpus, *out, "--model", damaged, "--quiet")
    fails(4, "encode", corpus, *out, "--model", tiny_model, "--method", "llm2vec-gen")
    fails(4, "encode", corpus, *out, "--model", tiny_model, "--backbone", tiny_model)


def test_non_finite_embeddings(corpus: Path, tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = shutil.copytree(tiny_model, tmp_path / "nan")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out.npy"
    assert "row 0" in fails(5, "encode", corpus, "--out", out, "--model", model, "--quiet")
    assert not out.exists()


def test_wrong_usage(corpus: Path, tmp_path: Path, options: list[object]) -> None:
    out = ["--out", tmp_path / "out.npy"]
    assert ".txt" in fails(2, "encode", corpus, "--out", tmp_path / "out.txt", *options)
    assert "nowhere" in fails(2, "encode", corpus, "--out", tmp_path / "nowhere/out.npy", *options)
    assert "nosuch" in fails(2, "encode", corpus, *out, "--prompt-name", "nosuch", *options)
    both = ["--prompt", "a", "--prompt-name", "query"]
    assert "not both" in fails(2, "encode", corpus, *out, *both, *options)
    assert "48" in fails(2, "encode", corpus, *out, "--truncate-dim", "49", *options)
    assert "abacus" in fails(2, "info", "--device", "abacus")
    assert run("encode", corpus, *out, "--dtype", "int3").exit_code == 2
    assert run("encode", corpus).exit_code == 2
    assert run("nosuch").exit_code == 2


def test_progress_and_warnings_stay_off_stdout(corpus: Path, options: list[object]) -> None:
    loud = [option for option in options if option != "--quiet"]
    result = run("encode", corpus, "--out", "-", *loud, "--max-length", "8")
    assert result.exit_code == 0
    assert len([json.loads(line) for line in result.stdout.splitlines()]) == len(TEXTS)
    assert f"{len(TEXTS)} embeddings of 48 dimensions" in result.stderr


def test_info(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(done("info", "--device", "cpu", "--json"))
    assert facts["gen_fast"] == gen_fast.__version__
    assert facts["device"] == "cpu"
    assert facts["instructions"] == native.instructions()
    assert set(facts["implementations"]) == set(gen_fast.ops.OP_NAMES)
    facts = json.loads(done("info", "--device", "cpu", "--model", tiny_model, "--json"))
    assert (facts["method"], facts["dimension"], facts["max_length"]) == ("mean", 48, 512)
    assert set(facts["prompts"]) == {"query", "document"}
    assert facts["fingerprint"]["family"] == "llama"
    assert "  attention: " in done("info", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(native, "missing", lambda: "is not built")
        assert "instructions: none: the C++ extension is not built" in done(
            "info", "--device", "cpu"
        )
    monkeypatch.setattr(gen_fast.ops, "FORCED", "reference")
    facts = json.loads(done("info", "--device", "cpu", "--json"))
    assert set(facts["implementations"].values()) == {"reference"}
    monkeypatch.setattr(gen_fast.ops, "FORCED", "nosuch")
    assert "nosuch" in fails(2, "info", "--device", "cpu")


def test_export(tiny_model: Path, expected: np.ndarray, tmp_path: Path) -> None:
    out = tmp_path / "st"
    assert done("export", tiny_model, "--out", out, "--method", "mean", "--quiet") == ""
    vectors = gen_fast.load(out, device="cpu", dtype="float32").encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-6)
    assert "not an empty directory" in fails(2, "export", tiny_model, "--out", out)
    again = ("--out", tmp_path / "again", "--quiet")
    assert "'echo'" in fails(4, "export", tiny_model, *again, "--method", "echo")
    assert "layout already" in fails(4, "export", out, *again)


def test_every_method_can_be_chosen() -> None:
    assert {str(method) for method in Method} == set(METHODS)
    own = {GEM, LLM2VEC, LLM2VEC_BARE, LLM2VEC_GEN, SENTENCE_TRANSFORMERS}
    assert {*TRAINING_FREE, *own} == set(METHODS)


def test_help_documents_exit_codes_without_importing_torch() -> None:
    assert "4  a problem with a model" in done("--help")
    assert done("--version") == f"gen-fast {gen_fast.__version__}\n"
    code = (
        "import sys, gen_fast.cli\n"
        "try: gen_fast.cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for flag in (["--help"], ["--version"], ["encode", "--help"]):
        command = [sys.executable, "-c", code, *flag]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_installed_script(corpus: Path, options: list[object]) -> None:
    command = [str(SCRIPT)]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"gen-fast {gen_fast.__version__}\n"
    arguments = [*command, "encode", "missing.txt", "--out", "out.npy"]
    missing = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert missing.returncode == 3
    assert missing.stderr == "gen-fast: error: missing.txt: no such file\n"
    # Non-ASCII data whatever the locale.
    arguments = [*command, "encode", str(corpus), "--out", "-", *map(str, options)]
    ascii_locale = {**os.environ, "PYTHONIOENCODING": "ascii"}
    encoded = subprocess.run(arguments, capture_output=True, env=ascii_locale, check=True)
    assert len([json.loads(line) for line in encoded.stdout.splitlines()]) == len(TEXTS)
    assert encoded.stderr == b""


def test_closed_pipe(tmp_path: Path, options: list[object]) -> None:
    many = tmp_path / "many.txt"
    many.write_text("text\n" * 400)  # far more output than a pipe buffers
    command = [str(SCRIPT), "encode", str(many), "--out", "-", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0
