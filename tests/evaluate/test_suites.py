"""Each suite on stand-in data of its own form, against scores worked out by hand."""

import json
import logging

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from mteb.abstasks import abstask, retrieval_dataset_loaders
from mteb.tasks.retrieval.eng import bright_v1_1_retrieval
from stand_ins import KnownVectors, angle

from gen_fast.errors import ConfigError
from gen_fast.evaluate import advbench_ir
from gen_fast.evaluate.instructions import Instructions
from gen_fast.evaluate.runner import evaluate, read_scores
from gen_fast.evaluate.suites import suites_of

PUBLISHED = Instructions.read()
# Gain of the one right document at rank 2.
SECOND = 1 / np.log2(3)


def only(evaluation):
    assert not evaluation.failures
    return evaluation.scores[0]


@pytest.fixture
def retrieval_data(monkeypatch):
    """Tables as they lie on the Hub: two questions, three documents with titles, right answers."""
    tables = {
        "queries": [{"_id": "q0", "text": " ask 0"}, {"_id": "q1", "text": "ask 1"}],
        "corpus": [
            {"_id": f"d{i}", "title": "of" if i else "", "text": f"doc {i}"} for i in range(3)
        ],
        "default": [
            {"query-id": "q0", "corpus-id": "d0", "score": 1},
            {"query-id": "q1", "corpus-id": "d1", "score": 1},
        ],
    }
    hub = {
        "get_dataset_config_names": lambda *where: list(tables),
        "get_dataset_split_names": lambda *where, **options: ["test"],
        "load_dataset": lambda path, config, **options: Dataset.from_list(tables[config]),
    }
    for name, function in hub.items():
        monkeypatch.setattr(retrieval_dataset_loaders, name, function)


def test_a_retrieval_task_of_mteb(retrieval_data, tmp_path):
    """q0 finds its document first, q1 second."""
    model = KnownVectors(
        {
            "ask 0": angle(0),
            "ask 1": angle(50),
            "doc 0": angle(5),
            "of doc 1": angle(80),
            "of doc 2": angle(40),
        }
    )
    found = only(evaluate(model, ["FiQA2018"], out=tmp_path, instructions="llm2vec-gen"))
    assert found.score == pytest.approx((1 + SECOND) / 2, abs=1e-5)
    assert found.standard_error == pytest.approx((1 - SECOND) / 2, abs=1e-5)
    assert found.items.values == pytest.approx([1, SECOND], abs=1e-5)
    asked = dict(model.seen)
    assert asked["ask 0"]["prompt"] == PUBLISHED.tasks["FiQA2018"] + " "
    assert asked["of doc 1"]["prompt"] == "Summarize the following passage: "
    assert model.lengths == {512}
    assert model.max_seq_length == 77


def test_a_similarity_task_of_mteb(monkeypatch, tmp_path):
    """Ranks of the four cosines are 1 2 4 3 where they should be 1 2 3 4: 1 - 6·2/60."""
    pairs = {"a": 0, "b": 20, "c": 50, "d": 40}
    data = Dataset.from_dict(
        {"sentence1": ["root"] * 4, "sentence2": list(pairs), "score": [5.0, 4.0, 3.0, 1.0]}
    )
    monkeypatch.setattr(abstask, "load_dataset", lambda **options: DatasetDict({"test": data}))
    vectors = {"root": angle(0), **{name: angle(degrees) for name, degrees in pairs.items()}}
    found = only(evaluate(KnownVectors(vectors), ["STS12"], out=tmp_path))
    assert found.score == pytest.approx(0.8)
    assert found.items.score == pytest.approx(0.8)


def test_bright_leaves_out_what_a_question_excludes(monkeypatch, tmp_path):
    """The nearest document of q0 is excluded, so that its right one, second, comes first."""
    documents = [{"id": f"d{i}", "content": f"doc {i}"} for i in range(3)]
    examples = [
        {"id": "q0", "query": "ask 0", "gold_ids": ["d1"], "excluded_ids": ["d0"]},
        {"id": "q1", "query": "ask 1", "gold_ids": ["d1"], "excluded_ids": ["N/A"]},
    ]
    tables = {"documents": documents, "examples": examples}

    def load(path, name, split, **options):
        assert (path, split) == ("mteb/BRIGHT", "biology")
        return Dataset.from_list(tables[name])

    monkeypatch.setattr(bright_v1_1_retrieval.datasets, "load_dataset", load)
    model = KnownVectors(
        {
            "ask 0": angle(0),
            "ask 1": angle(50),
            "doc 0": angle(5),
            "doc 1": angle(20),
            "doc 2": angle(60),
        }
    )
    found = only(
        evaluate(model, ["BrightBiologyRetrieval"], out=tmp_path, instructions="llm2vec-gen")
    )
    assert found.items.values == pytest.approx([1, SECOND], abs=1e-5)
    assert dict(model.seen)["ask 0"]["prompt"].startswith("Given a Biology post")
    assert model.lengths == {4096}


def test_advbench_ir_scores_unnormalised_vectors(monkeypatch, tmp_path):
    """By cosine q0 would find its own passage first; by the dot product a long vector wins."""
    words = [f"w{i}" for i in range(130)]
    requests = [
        {"ID": 0, "query": "ask 0", "title": "T0", "document": " ".join(words)},
        {"ID": 1, "query": "ask 1", "title": "T1", "document": "short"},
    ]
    wikipedia = [{"ID": 7, "title": "W", "passage": "harmless"}]
    tables = {advbench_ir.REQUESTS: requests, advbench_ir.WIKIPEDIA: wikipedia}
    monkeypatch.setattr(
        advbench_ir, "load_dataset", lambda path, split: Dataset.from_list(tables[path])
    )
    model = KnownVectors(
        {
            "ask 0": angle(0),
            "ask 1": angle(90),
            f"T0 # {' '.join(words[:100])}": angle(10),
            "T1 # short": angle(80),
            "W # harmless": angle(40, length=5.0),
        }
    )
    found = only(evaluate(model, ["advbench-ir"], out=tmp_path, instructions="llm2vec-gen"))
    assert found.score == 1.0  # among the first five of three
    kept = json.loads(next(tmp_path.rglob("AdvBench-IR.json")).read_text())
    scores = kept["scores"]["train"][0]
    assert scores["hit_rate_at_1"] == 0.0
    assert scores["any_harm_at_1"] == 0.0
    assert scores["any_harm_at_5"] == 1.0
    assert dict(model.seen)["ask 0"]["prompt"] == (
        "Generate a relevant document that answers this query: "
    )


def test_passages_of_advbench_ir():
    """A rest of under 100 words is left out, unless it is the whole document."""
    rows = [
        {"ID": 3, "title": "A", "document": "x " * 250},
        {"ID": 4, "title": "B", "document": "y " * 20},
    ]
    documents, relevant = advbench_ir.passages(rows, [{"ID": 9, "title": "C", "passage": "z"}])
    assert [row["id"] for row in documents] == [
        "malicious_3-0",
        "malicious_3-1",
        "malicious_4-0",
        "wiki_9",
    ]
    assert relevant == {
        "3": {"malicious_3-0": 1, "malicious_3-1": 1},
        "4": {"malicious_4-0": 1},
    }


def test_suites_have_the_settings_of_the_papers():
    local, eng, bright, advbench = suites_of(("local", "mteb", "bright", "advbench-ir"))
    assert [(s.max_length, s.similarity) for s in (eng, bright, advbench)] == [
        (512, "cosine"),
        (4096, "cosine"),
        (512, "dot"),
    ]
    assert len(local.tasks) == 8
    assert len(eng.tasks) == 41
    assert len(bright.tasks) == 12


def test_a_task_keeps_the_settings_of_its_suite():
    suites = suites_of(("TriviaAnswers", "ArguAna", "BrightPonyRetrieval", "NFCorpus"))
    assert [(suite.max_length, len(suite.tasks)) for suite in suites] == [
        (512, 1),
        (512, 1),
        (4096, 1),
        (None, 1),
    ]


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="no task named 'Nothing': there are local, mteb"):
        suites_of(("Nothing",))


def test_only_what_is_missing_is_run(retrieval_data, tmp_path):
    vectors = dict.fromkeys(("ask 0", "ask 1", "doc 0", "of doc 1", "of doc 2"), angle(1))
    first = KnownVectors(vectors)
    evaluate(first, ["FiQA2018"], out=tmp_path, trained_on=["FiQA2018"])
    again = KnownVectors(vectors)
    found = only(evaluate(again, ["FiQA2018"], out=tmp_path, trained_on=["FiQA2018"]))
    assert first.seen
    assert not again.seen
    assert found.in_domain
    evaluate(again, ["FiQA2018"], out=tmp_path, trained_on=["FiQA2018"], overwrite=True)
    assert again.seen
    other = KnownVectors(vectors)
    evaluate(other, ["FiQA2018"], out=tmp_path, instructions="llm2vec-gen")
    assert other.seen
    (kept,) = read_scores(tmp_path).values()
    assert [(score.score, score.in_domain) for score in kept] == [(found.score, False)]


def test_data_that_cannot_be_had_is_named_and_the_rest_is_run(
    retrieval_data, monkeypatch, tmp_path, caplog
):
    def unreachable(**options):
        raise ConnectionError("no route to the Hub")

    monkeypatch.setattr(abstask, "load_dataset", unreachable)
    vectors = dict.fromkeys(("ask 0", "ask 1", "doc 0", "of doc 1", "of doc 2"), angle(1))
    with caplog.at_level(logging.ERROR, "gen_fast"):
        evaluation = evaluate(KnownVectors(vectors), ["STS12", "FiQA2018"], out=tmp_path)
    assert [score.task for score in evaluation.scores] == ["FiQA2018"]
    assert evaluation.failures == {"STS12": "no route to the Hub"}
    assert "STS12 could not be run" in caplog.text
