"""Encoders behind mteb's protocol."""

import copy

import mteb
import numpy as np
import pytest
from mteb.mocks import mock_run
from mteb.results import TaskResult
from mteb.types import PromptType
from stand_ins import KnownVectors

import gen_fast
from gen_fast.errors import ConfigError
from gen_fast.evaluate.embedder import Embedder, limited_to
from gen_fast.evaluate.instructions import Instructions
from gen_fast.evaluate.recording import record_items
from gen_fast.testing import save_tiny_adapter


@pytest.fixture(scope="module")
def encoder(tiny_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    save_tiny_adapter(directory, tiny_model)
    return gen_fast.load(directory, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def retrieval_task():
    return mteb.get_task("FiQA2018").metadata


def test_mteb_s_own_checks_pass(encoder, monkeypatch):
    """And what is recorded beside their scores are the items of those scores."""
    mocks = [copy.copy(task) for task in mock_run.ALL_MOCK_TASK_TEST_GRID]
    for task in mocks:
        record_items(task)
    monkeypatch.setattr(mock_run, "ALL_MOCK_TASK_TEST_GRID", mocks)
    embedder = Embedder(encoder, name="tiny", instructions=Instructions.read())
    results = mteb.mock_run(embedder)
    run = {name: result for name, result in results.items() if result is not None}
    assert {name: r for name, r in run.items() if not isinstance(r, TaskResult)} == {}
    assert len(run) > 15
    kinds = {task.metadata.name: task.metadata.type for task in mocks}
    recorded = set()
    for name, result in run.items():
        for part in result.scores["test"]:
            if "items" in part:
                recorded.add(kinds[name])
                assert part["standard_error"] >= 0
                if part["items"]["statistic"] in ("mean", "draws"):
                    mean = np.mean(part["items"]["values"])
                    assert mean == pytest.approx(part["main_score"], abs=1e-4)
    assert recorded >= {"Retrieval", "STS", "PairClassification", "Classification", "Clustering"}


def embedded(embedder, task, texts, prompt_type):
    return embedder.encode(
        [{"text": texts}],
        task_metadata=task,
        hf_split="test",
        hf_subset="default",
        prompt_type=prompt_type,
        batch_size=8,
    )


def test_vectors_are_the_encoder_s(encoder, retrieval_task):
    lines = Instructions.read()
    embedder = Embedder(encoder, name="tiny", instructions=lines)
    found = embedded(embedder, retrieval_task, ["one ", "two"], PromptType.query)
    line = lines.tasks["FiQA2018"]
    np.testing.assert_allclose(found, encoder.encode(["one", "two"], prompt=f"{line} "), atol=1e-6)


def test_without_instructions_the_model_s_prompts_are_used(encoder, retrieval_task):
    embedder = Embedder(encoder, name="tiny")
    found = embedded(embedder, retrieval_task, ["one"], PromptType.document)
    np.testing.assert_allclose(found, encoder.encode_document(["one"]), atol=1e-6)
    found = embedded(embedder, retrieval_task, ["one"], None)
    np.testing.assert_allclose(found, encoder.encode(["one"]), atol=1e-6)


def test_hyde_answers_queries_alone(tiny_model, retrieval_task, monkeypatch):
    encoder = gen_fast.load(tiny_model, method="hyde", dtype="float32", device="cpu")
    names = []
    monkeypatch.setattr(
        encoder, "encode", lambda texts, **options: names.append(options["prompt_name"]) or []
    )
    embedder = Embedder(encoder, name="tiny")
    for prompt_type in (PromptType.query, PromptType.document, None):
        embedded(embedder, retrieval_task, ["one"], prompt_type)
    assert names == ["query", "document", "document"]


def test_results_of_other_models_and_settings_have_other_revisions(encoder, tiny_model):
    plain = gen_fast.load(tiny_model, dtype="float32", device="cpu")
    embedders = [
        Embedder(encoder, name="a"),
        Embedder(plain, name="a"),
        Embedder(encoder, name="a", instructions=Instructions.read()),
        Embedder(encoder, name="a", similarity="dot"),
    ]
    with limited_to(encoder, 64):
        embedders.append(Embedder(encoder, name="a"))
    revisions = {embedder.mteb_model_meta.revision for embedder in embedders}
    assert len(revisions) == 5
    assert Embedder(encoder, name="a").mteb_model_meta.revision in revisions


def test_results_at_another_length_have_another_revision():
    """Also of a model whose text, as sentence-transformers', does not name its length."""
    revisions = set()
    for length in (None, 64, 9):
        model = KnownVectors({})
        with limited_to(model, length):
            revisions.add(Embedder(model, name="a").mteb_model_meta.revision)
    assert len(revisions) == 3


def test_a_length_lasts_as_long_as_it_should(encoder):
    own = encoder.max_length
    with limited_to(encoder, 9):
        assert encoder.max_length == 9
    assert encoder.max_length == own
    with limited_to(encoder, 10**9):
        assert encoder.max_length == encoder.backbone.config.max_positions


def test_similarities_that_mteb_does_not_score_are_refused():
    model = KnownVectors({})
    model.similarity_fn_name = "manhattan"
    with pytest.raises(ConfigError, match="must be cosine or dot, not 'manhattan'"):
        Embedder(model, name="a")
    Embedder(model, name="a", similarity="cosine")
