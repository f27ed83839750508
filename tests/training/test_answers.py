"""Answer files: resumed, sharded, and queries that are turned away."""

import json

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.embed.loading import load_generator
from gen_fast.formats.llm2vec import Settings, write_settings
from gen_fast.formats.peft import write_adapter
from gen_fast.io.embedding_files import read_embeddings
from gen_fast.io.text_files import Texts
from gen_fast.model.lora import Lora, LoraConfig
from gen_fast.model.sampling import Sampling
from gen_fast.model.weights import load_backbone
from gen_fast.testing import WHOLE_BLOCKS, save_tiny_model
from gen_fast.training.answers import Shard, generate_answers, usable_queries, write_own_queries
from gen_fast.training.records import Rejections, read_records
from gen_fast.training.teach import Taught, teach

WHOLE = Shard()
QUERIES = Texts([f"q{i}" for i in range(11)], [f"the cat {'in a hat ' * i}{i}" for i in range(11)])


@pytest.fixture(scope="module")
def generator(tiny_model):
    return load_generator(
        tiny_model,
        device="cpu",
        dtype="float32",
        max_new_tokens=6,
        batch_size=4,
        sampling=Sampling(1.0),
    )


def made(path, generator, shard=WHOLE):
    return generate_answers(QUERIES, path, generator, shard=shard, show_progress_bar=False)


def test_a_row_a_query(tmp_path, generator):
    rows = read_records(made(tmp_path / "a.jsonl", generator))
    assert {row["id"]: row["query"] for row in rows} == dict(
        zip(QUERIES.ids, QUERIES.texts, strict=True)
    )
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert list(rows[0]) == ["id", "query", "answer", "finish_reason"]


@pytest.mark.parametrize("kept", [0, 3, 4, 6, 11])
def test_an_interrupted_run_writes_what_was_missing(tmp_path, generator, kept):
    path = made(tmp_path / "a.jsonl", generator)
    whole = path.read_text()
    lines = whole.splitlines(True)
    path.write_text("".join(lines[:kept]) + (lines[kept][:9] if kept < len(lines) else ""))
    made(path, generator)
    assert path.read_text() == whole


def test_shards_are_the_whole(tmp_path, generator):
    paths = [made(tmp_path / "a.jsonl", generator, Shard(i, 3)) for i in range(3)]
    assert [path.name for path in paths] == [f"a-0000{i}-of-00003.jsonl" for i in range(3)]
    ids = [row["id"] for path in paths for row in read_records(path)]
    assert sorted(ids) == sorted(QUERIES.ids)
    with pytest.raises(gen_fast.InputError, match="3 of 3"):
        Shard(3, 3)


def test_other_queries_or_settings_are_refused(tmp_path, generator):
    path = made(tmp_path / "a.jsonl", generator)
    with pytest.raises(gen_fast.InputError, match="queries_sha256"):
        generate_answers(Texts(["x"], ["y"]), path, generator, show_progress_bar=False)


def test_queries_that_are_turned_away(tmp_path):
    texts = Texts(
        ["a", "b", "c", "d", "e", "a"],
        ["one", " ", "one ", "x" * 20_001, "two", "three"],
    )
    rejections = Rejections(tmp_path / "rejected.jsonl")
    kept = usable_queries(texts, rejections)
    assert (kept.ids, kept.texts) == (["a", "e"], ["one", "two"])
    assert rejections.counts == {
        "empty query": 1,
        "duplicate query": 1,
        "query longer than 20000 characters": 1,
        "duplicate id": 1,
    }
    with pytest.raises(gen_fast.InputError, match="no usable query among 1"):
        usable_queries(Texts(["a"], [""]), rejections)


def test_own_queries_are_different_and_go_on(tmp_path, tiny_model):
    # A model that ends at once now and then: its head's rows are all alike but for their noise.
    generator = load_generator(
        tiny_model, device="cpu", dtype="float32", max_new_tokens=400, batch_size=64
    )
    path = tmp_path / "own.jsonl"
    few = write_own_queries(3, path, generator, show_progress_bar=False)
    assert len(set(few.texts)) == 3
    more = write_own_queries(5, path, generator, show_progress_bar=False)
    assert more.texts[:3] == few.texts
    assert len(set(more.texts)) == 5
    impossible = load_generator(
        tiny_model, device="cpu", dtype="float32", max_new_tokens=1, batch_size=4
    )
    with pytest.raises(gen_fast.InputError, match="only"):
        write_own_queries(2, tmp_path / "no.jsonl", impossible, show_progress_bar=False)


def test_teachers(tmp_path, tiny_model, generator):
    path = made(tmp_path / "a.jsonl", generator)
    rows = [row for row in read_records(path) if row["answer"]]
    taught = teach(
        [path], tmp_path / "t.parquet", str(tiny_model), method="mean", show_progress_bar=False
    )
    found = read_embeddings(tmp_path / "t.parquet")
    assert taught == Taught(len(rows), 0)
    assert len(found.ids) == len(rows)
    encoder = gen_fast.load(tiny_model, dtype="float32", device="cpu")
    expected = encoder.encode([row["answer"] for row in rows])
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    assert found.texts == [row["answer"] for row in rows]
    with pytest.raises(gen_fast.ModelNotFoundError, match="give a method"):
        teach([path], tmp_path / "t.parquet", str(tmp_path / "nothing"), show_progress_bar=False)


def test_llm2vec_as_teacher(tmp_path, tiny_model, generator):
    """A LoRA checkpoint, as it embeds by itself, and as LLM2Vec-Gen's authors take it."""
    path = made(tmp_path / "a.jsonl", generator)
    answers = [row["answer"] for row in read_records(path) if row["answer"]]
    backbone = load_backbone(tiny_model)
    lora, directory = Lora(LoraConfig(rank=2), backbone.config), tmp_path / "lora"
    with torch.no_grad():
        for b in lora.b:
            b.fill_(0.01)
    write_adapter(directory, lora.weights(), base="owner/base", fingerprint=backbone.fingerprint)
    write_settings(directory, Settings())
    options = {"backbone": tiny_model, "show_progress_bar": False}
    for method in ("llm2vec", "llm2vec-bare"):
        teach([path], tmp_path / "t.parquet", str(directory), method=method, **options)
        found = read_embeddings(tmp_path / "t.parquet")
        encoder = gen_fast.load(
            directory, method=method, backbone=tiny_model, dtype="float32", device="cpu"
        )
        np.testing.assert_allclose(found.vectors, encoder.encode(answers), atol=1e-5)
        assert found.metadata.method == method
        assert not found.metadata.normalized
    with pytest.raises(gen_fast.UnsupportedModelError, match="LoRA adapter"):
        teach([path], tmp_path / "t.parquet", str(directory), method="llm2vec-gen", **options)
    with pytest.raises(gen_fast.ConfigError, match="backbone has no meaning without a method"):
        teach([path], tmp_path / "t.parquet", str(directory), **options)


def test_a_quantised_teacher(tmp_path, generator):
    path, out = made(tmp_path / "a.jsonl", generator), tmp_path / "t.parquet"
    teacher = tmp_path / "teacher"
    save_tiny_model(teacher, "llama-tied", **WHOLE_BLOCKS)
    options = {"device": "cpu", "dtype": "float32", "quantize": "int8-weight-only"}
    teach([path], out, str(teacher), method="mean", show_progress_bar=False, **options)
    found = read_embeddings(out)
    encoder = gen_fast.load(teacher, method="mean", **options)
    np.testing.assert_allclose(found.vectors, encoder.encode(found.texts), atol=1e-5)
    assert found.metadata.quantize == "int8-weight-only"
    with pytest.raises(gen_fast.ConfigError, match="quantize has no meaning without a method"):
        teach([path], out, "minilm", **options)


def test_a_sentence_transformer_as_teacher(tmp_path, generator):
    path = made(tmp_path / "a.jsonl", generator)
    teach([path], tmp_path / "t.parquet", "minilm", show_progress_bar=False)
    found = read_embeddings(tmp_path / "t.parquet")
    assert found.vectors.shape[1] == 384
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("method", [None, "mean"])
def test_answers_that_a_teacher_truncates_are_counted(tmp_path, tiny_model, caplog, method):
    path = tmp_path / "a.jsonl"
    answers = ["the cat", "the cat " * 300, "a hat " * 120 + "." * 200]
    rows = [{"id": str(i), "query": "q", "answer": text} for i, text in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = "minilm" if method is None else str(tiny_model)
    out = tmp_path / "t.parquet"
    assert teach([path], out, teacher, method=method, show_progress_bar=False) == Taught(3, 2)
    assert "read only the beginning of 2 of 3 answers" in caplog.text
