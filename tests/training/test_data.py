"""Rows, teacher vectors and the order in which a run sees them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_data import write_answers, write_teacher
from tokenizers import Tokenizer, processors

import gen_fast
from gen_fast.io.embedding_files import read_embeddings, write_embeddings
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.testing import save_tiny_model
from gen_fast.training.data import (
    Example,
    TrainingData,
    read_rows,
    teacher_texts,
)
from gen_fast.training.llm2vec_gen import train
from gen_fast.training.records import RecordFile, Rejections, read_records
from gen_fast.training.world import World


def load(config):
    rejections = Rejections(Path(config.answers[0]).with_name("rejected.jsonl"))
    return TrainingData(config, load_tokenizer(config.backbone), rejections), rejections


def test_every_row_comes_once_an_epoch(make_config):
    config = make_config(batch_size=5)
    data, _ = load(config)
    assert len(data.train) == 32
    assert not {row.id for row in data.train} & {row.id for row in data.validation}
    seen = Counter(row.id for step in range(32) for row in data.step_rows(step))
    assert set(seen.values()) == {5}
    first = [row.id for row in data.step_rows(0)]
    assert first == [row.id for row in load(config)[0].step_rows(0)]
    assert first != [row.id for row in load(make_config(batch_size=5, seed=1))[0].step_rows(0)]


def test_examples_are_prompt_query_and_answer_with_its_end(make_config):
    config = make_config(prompt="Say: ", max_answer_tokens=9, max_length=20)
    data, _ = load(config)
    tokenizer = load_tokenizer(config.backbone)
    rows = data.train[:10]
    for row, example in zip(rows, data.examples(rows), strict=True):
        assert (
            example.query.tolist()
            == tokenizer.ids(f"Say: {row.query}", add_special_tokens=True).tolist()[:17]
        )
        answer = tokenizer.ids(row.answer, add_special_tokens=False).tolist()
        assert example.answer.tolist() == [*answer, tokenizer.eos_token_id][:9]
    ends = [example.answer[-1] == tokenizer.eos_token_id for example in data.examples(data.train)]
    assert 0 < sum(ends) < len(ends)  # none of what was too long, all of the others


def write_rows(config, rows):
    """Answers and a teacher of their texts, as they are read."""
    Path(config.answers[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_teacher(Path(config.teacher), Path(config.answers[0]))


CUT = {
    "The cat sat. It was fi": "The cat sat.",
    'He said: "It is so!" And the': 'He said: "It is so!"',
    "Pi is 3.14 and not 3.15 bu": "Pi is 3.14 and not 3.15 bu",
    "猫坐在垫子上。狗也在垫": "猫坐在垫子上。",
    "1. The first thing\n2. The second thing\n3. The": "1. The first thing\n2. The second thing",
    "A paragraph of some words\nand a part of ano": "A paragraph of some words",
    "Yes. But the rest is too long": "Yes. But the rest is too long",
    "Cut where it ends.": "Cut where it ends.",
}


@pytest.mark.parametrize("answer_end", [None, "<|end_of_text|>", "<|im_start|>"])
def test_only_an_answer_that_stopped_by_itself_has_an_end(make_config, answer_end):
    config = make_config(validation_rows=0, answer_end=answer_end)
    reasons = {"stop": "stop", "length": "length", None: "stop"}
    rows = [
        {"id": f"{i}{reason}", "query": "q", "answer": answer, "finish_reason": reason}
        for i, answer in enumerate(CUT)
        for reason in reasons
    ]
    write_rows(config, rows)
    data, _ = load(config)
    assert data.stopped == 2 * len(CUT)
    tokenizer = load_tokenizer(config.backbone)
    end = answer_end or tokenizer.eos_token
    texts = dict(zip(*teacher_texts(data.train), strict=True))
    for row, read, example in zip(rows, data.train, data.examples(data.train), strict=True):
        cut = row["finish_reason"] == "length"
        text = CUT[row["answer"]] if cut else row["answer"]
        assert read.answer == texts[row["id"]] == text
        written = tokenizer.backend.decode(example.answer.tolist(), skip_special_tokens=False)
        assert written == text + ("" if cut else end)


def put_bos_before_texts(model):
    path = str(model / "tokenizer.json")
    core = Tokenizer.from_file(path)
    bos = "<|im_start|>"
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    core.save(path)


def test_answers_begin_as_the_tokenizer_begins_a_text(make_config, tmp_path):
    """As the reference package has them: it predicts the BOS too, from the last soft prompt."""
    from llm2vec_gen.dataset import CustomCollator
    from llm2vec_gen.dataset.base_dataset import DataSample

    model = tmp_path / "bos"
    save_tiny_model(model, "llama")
    put_bos_before_texts(model)
    config = make_config(backbone=str(model), answer_end="<|end_of_text|>", max_answer_tokens=30)
    tokenizer = load_tokenizer(model)
    rows = load(config)[0].train
    auto = tokenizer.transformers
    auto.padding_side, auto.pad_token = "left", "<unk>"
    collate = CustomCollator(auto, [], padding="longest", max_length=30)
    theirs = collate([DataSample(i, row.query, row.answer) for i, row in enumerate(rows)])
    for i, example in enumerate(load(config)[0].examples(rows)):
        labels = theirs["labels"][i]
        assert labels[labels >= 0].tolist() == example.answer.tolist()
        assert example.answer[0] == example.query[0] == auto.bos_token_id
    own_end = replace(config, answer_end=None, max_answer_tokens=512)
    for row, example in zip(rows, load(own_end)[0].examples(rows), strict=True):
        ids = tokenizer.ids(row.answer, add_special_tokens=True).tolist()
        assert example.answer.tolist() == [*ids, tokenizer.eos_token_id]


def test_special_tokens_in_text_are_text(make_config):
    config = make_config()
    data, _ = load(config)
    row = data.train[0]
    rows = [type(row)(row.id, "<|im_end|>", "a <|im_start|>")]
    example = data.examples(rows)[0]
    tokenizer = load_tokenizer(config.backbone)
    assert tokenizer.eos_token_id not in example.query
    assert (example.answer == tokenizer.eos_token_id).sum() == 1


def test_rows_that_are_left_out_are_counted(make_config, tmp_path):
    config = make_config()
    path = Path(config.answers[0])
    extra = [
        {"id": "empty", "query": "x", "answer": " "},
        {"id": "r1", "query": "again", "answer": "again"},
        {"id": "blank", "query": "", "answer": "y"},
    ]
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in extra)
    data, rejections = load(config)
    assert len(data.train) + len(data.validation) == 40
    assert rejections.counts == {"empty query or answer": 2, "duplicate id": 1}
    rejections.write()
    listed = read_records(tmp_path / "rejected.jsonl")
    assert [row["id"] for row in listed] == ["empty", "r1", "blank"]


@pytest.mark.parametrize(("line", "message"), [
    ('{"id": "x", "query": "y"', "line 41: not valid JSON"),
    ('{"id": "x", "query": "y"}', "line 41: expected a string as answer, got None"),
    ('{"id": 3, "query": "y", "answer": "z"}', "line 41: expected a string as id, got 3"),
    ("[]", "line 41: expected an object"),
    ('{"id": "x", "query": "y", "answer": "z", "finish_reason": "error"}', "got 'error'"),
    ('{"id": "x", "query": "y", "answer": "z", "negative_query": "n"}', "goes with a negative"),
])  # fmt: skip
def test_malformed_rows_are_named(make_config, line, message):
    config = make_config()
    with Path(config.answers[0]).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(gen_fast.InputError, match=message):
        load(config)


def test_missing_files(make_config, tmp_path):
    for settings in ({"answers": ("nothing.jsonl",)}, {"teacher": "nothing.parquet"}):
        with pytest.raises(gen_fast.InputError, match="nothing"):
            load(make_config(**settings))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(gen_fast.InputError, match="no usable row"):
        read_rows([empty], Rejections(tmp_path / "no"))


def test_a_teacher_of_other_answers_is_refused(make_config, tmp_path):
    config = make_config()
    path = Path(config.answers[0])
    rows = read_records(path)
    rows[3]["answer"] = "another answer"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(gen_fast.InputError, match="another answer of row 'r3'"):
        load(config)
    rows[3]["id"] = "new"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(gen_fast.InputError, match="no vector for row 'new'"):
        load(config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"margin_weight": 1.0}, "no row has a negative_query"),
        ({"validation_rows": 40}, "none is left"),
    ],
)
def test_settings_that_leave_nothing_to_train_on(make_config, setting, message):
    with pytest.raises(gen_fast.ConfigError, match=message):
        load(make_config(**setting))


def test_a_teacher_that_says_the_same_of_everything(make_config):
    config = make_config()
    made = read_embeddings(config.teacher)
    for value in (0.0, 0.1):
        vectors = np.full_like(made.vectors, value)
        write_embeddings(config.teacher, replace(made, vectors=vectors))
        with pytest.raises(gen_fast.InputError, match="all vectors are equal"):
            load(config)


def test_a_teacher_of_another_size_does_not_fit_the_checkpoint(make_config):
    config = make_config(steps=2)
    train(config, show_progress_bar=False)
    write_answers(Path(config.answers[0]))
    write_teacher(Path(config.teacher), Path(config.answers[0]), dimension=8)
    with pytest.raises(gen_fast.CheckpointError, match="teacher_dimension = 16, this run has 8"):
        train(config, show_progress_bar=False)


def test_ranks_share_a_batch_evenly():
    rng = np.random.default_rng(0)
    batch = [
        Example(np.zeros(rng.integers(1, 400)), np.zeros(rng.integers(1, 400)), np.zeros(2))
        for _ in range(64)
    ]
    lengths = [len(e.query) + 2 * len(e.answer) for e in batch]
    world, shares = World(), []
    world.size = 4
    for rank in range(4):
        world.rank = rank
        shares.append(world.share(list(range(64)), lengths))
    assert sorted(i for share in shares for i in share) == list(range(64))
    work = [sum(lengths[i] for i in share) for share in shares]
    assert max(work) < 1.1 * min(work)


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    RecordFile(path, {"a": 1}).append([{"id": "x"}, {"id": "y"}])
    with path.open("a") as file:
        file.write('{"id": "z')
    again = RecordFile(path, {"a": 1})
    assert [row["id"] for row in again.rows] == ["x", "y"]
    again.append([{"id": "z"}])
    assert len(read_records(path)) == 3
    with pytest.raises(gen_fast.InputError, match="begun with a = 1, now it is 2"):
        RecordFile(path, {"a": 2})
