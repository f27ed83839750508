"""Batches side by side: the same results, order and errors, and nothing left behind."""

import itertools
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gen_fast
from gen_fast.embed import windows
from gen_fast.embed.encoder import Encoder
from gen_fast.io.cache import cache_directory
from gen_fast.model import stream_choice
from gen_fast.model.choices import FP8, QUANTIZED
from gen_fast.model.stream_choice import StreamChoice, candidates, fastest
from gen_fast.model.streams import Streams
from gen_fast.model.token_budget import activation_bytes_per_token
from gen_fast.ops import native

needs_module = pytest.mark.skipif(native.missing() is not None, reason="streams need gen_fast._C")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("gen_fast-stream")]
    torch.set_num_threads(before)


def ragged_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "in", "a", "hat", "at", "noon", "while", "it", "was", "raining"]
    return [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(count)]


def load(tiny_model: Path, streams: int | None = 2, **options) -> gen_fast.Encoder:
    encoder = gen_fast.load(tiny_model, dtype="float32", device="cpu", streams=streams, **options)
    encoder.budget.tokens = 300  # of bytes: batches of a few texts
    return encoder


def forgetful(encoder: gen_fast.Encoder, monkeypatch: pytest.MonkeyPatch, fails) -> None:
    """Let a forward pass for which `fails` is true run out of memory."""
    forward = encoder.backbone.forward

    def run(batch, **options):
        if fails(batch):
            raise torch.OutOfMemoryError("simulated")
        return forward(batch, **options)

    monkeypatch.setattr(encoder.backbone, "forward", run)


# -------------------------------------------------------------------------------------- threads


@needs_module
@pytest.mark.parametrize(("threads", "count", "each"), [(2, 2, 1), (4, 2, 2), (3, 2, 1)])
def test_streams_share_the_threads_and_nobody_elses_change(threads, count, each):
    torch.set_num_threads(threads)
    matrix = torch.randn(600, 600)

    def used() -> int:
        matrix @ matrix  # MKL or oneDNN must not change it back
        matrix.exp()
        return torch.get_num_threads()

    try:
        with Streams(count) as streams:
            assert [result() for result in [streams.start(used) for _ in range(5)]] == [each] * 5
            assert torch.get_num_threads() == threads
            later: list[int] = []
            thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert later == [threads]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(2)


# -------------------------------------------------------------------------------------- results


@needs_module
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("method", ["mean", "echo", "llm2vec"])
def test_same_results_and_order_as_in_one_stream(tiny_model, monkeypatch, deterministic, method):
    same = np.testing.assert_array_equal if deterministic else np.testing.assert_allclose
    within = {} if deterministic else {"rtol": 1e-4, "atol": 1e-6}
    texts = ragged_texts(30)
    options = {"deterministic": deterministic, "method": method}
    prompt = "in th"  # of which some texts share less
    one, two = load(tiny_model, 1, **options), load(tiny_model, 2, **options)
    expected = one.encode(texts, prompt=prompt, normalize_embeddings=True)
    actual = two.encode(texts, prompt=prompt, normalize_embeddings=True)
    same(actual, expected, **within)
    monkeypatch.setattr(windows, "WINDOW_TEXTS", 7)
    for size in (None, 2):
        for a, b in zip(
            one.encode_blocks([texts, [], texts[:9]], batch_size=size),
            two.encode_blocks([texts, [], texts[:9]], batch_size=size),
            strict=True,
        ):
            same(a.embeddings, b.embeddings, **within)


@pytest.fixture(scope="module")
def four_layers(smollm2, tmp_path_factory):
    """SmolLM2's first, with its real weights: to quantise all thirty takes most of a test."""
    folder = tmp_path_factory.mktemp("four")
    for path in smollm2.glob("tokenizer*"):
        shutil.copy(path, folder)
    config = json.loads((smollm2 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    layer = re.compile(r"model\.layers\.(\d+)\.")
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if not (m := layer.match(n)) or int(m[1]) < 4]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@needs_module
# fp8 is for GPUs, streams are for a CPU.
@pytest.mark.parametrize(
    ("layers", "quantize"),
    [
        ("all", None),
        *(("four", kind) for kind in QUANTIZED if kind != FP8),
        *(pytest.param("all", x, marks=pytest.mark.slow) for x in QUANTIZED if x != FP8),
    ],
)
def test_real_weights_give_the_same_bits(smollm2, four_layers, layers, quantize):
    texts = ragged_texts(6)
    one = gen_fast.load(
        smollm2 if layers == "all" else four_layers,
        dtype="float32",
        device="cpu",
        quantize=quantize,
        deterministic=True,
        streams=1,
    )
    two = Encoder(one.backbone, one._tokenizer, one._method, deterministic=True, streams=2)
    np.testing.assert_array_equal(
        *(encoder.encode(texts, prompt="Answer this: ") for encoder in (one, two))
    )


@needs_module
def test_batches_are_run_by_two_threads_and_counted_in_their_order(tiny_model, monkeypatch):
    texts = ragged_texts(40)
    counts, names = {}, set()
    for streams in (1, 2):
        encoder = load(tiny_model, streams)
        forward = encoder.backbone.forward

        def run(batch, forward=forward, **options):
            names.add(threading.current_thread().name)
            return forward(batch, **options)

        monkeypatch.setattr(encoder.backbone, "forward", run)
        calls = []
        progress = {"on_progress": lambda n, calls=calls: calls.append((n, threading.get_ident()))}
        (block,) = encoder.encode_blocks([texts], **progress)
        counts[streams] = calls
    assert counts[1] == counts[2]
    assert sum(n for n, _ in counts[2]) == len(block.embeddings) == 40
    assert {"MainThread", "gen_fast-stream_0", "gen_fast-stream_1"} == names


# --------------------------------------------------------------------------------------- errors


@needs_module
def test_the_first_error_in_order_is_raised_and_the_others_stop(tiny_model, monkeypatch):
    encoder = load(tiny_model)
    start, handed, begun = Streams.start, itertools.count(1), []
    second = threading.Event()

    def numbered(streams, function, *arguments):
        # Numbered as they are handed over: either thread may begin before the other.
        return start(streams, fails, next(handed), function, *arguments)

    def fails(number, function, *arguments):
        begun.append(number)
        if number == 2:
            second.set()
            raise RuntimeError("the second")
        if number == 1:
            second.wait(10)
            raise RuntimeError("the first")
        return function(*arguments)

    monkeypatch.setattr(Streams, "start", numbered)
    with pytest.raises(RuntimeError, match="the first"):
        encoder.encode(ragged_texts(200))
    assert len(begun) <= 6  # not the other hundred batches


@needs_module
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_of_the_caller_stops_the_streams(tiny_model, error):
    encoder = load(tiny_model)

    def interrupt(texts: int) -> None:
        raise error

    with pytest.raises(error):
        list(encoder.encode_blocks([ragged_texts(200)], on_progress=interrupt))


@needs_module
def test_non_finite_rows_are_named(tiny_model):
    texts = ragged_texts(40)
    errors = []
    for streams in (1, 2):
        encoder = load(tiny_model, streams)
        encoder.backbone.embedding[encoder.tokenizer("o").input_ids[0]] = float("nan")
        with pytest.raises(gen_fast.NonFiniteError) as caught:
            encoder.encode(texts)
        errors.append(caught.value.rows)
    assert errors[0] == errors[1]


@needs_module
def test_a_generator_that_is_left_leaves_no_thread(tiny_model):
    blocks = load(tiny_model).encode_blocks([ragged_texts(50)] * 3)
    next(blocks)
    blocks.close()


@needs_module
def test_memory_for_one_batch_at_a_time(tiny_model, monkeypatch, caplog):
    """It goes on with one stream, and the budget stays."""
    texts = ragged_texts(60)
    expected = load(tiny_model, 1).encode(texts)
    encoder = load(tiny_model)
    forgetful(
        encoder, monkeypatch, lambda _: threading.current_thread() is not threading.main_thread()
    )
    np.testing.assert_array_equal(encoder.encode(texts), expected)
    assert encoder.budget.tokens == 300
    assert caplog.text.count("going on one by one") == 1
    np.testing.assert_array_equal(encoder.encode(texts), expected)  # not tried again


@needs_module
def test_memory_for_smaller_batches_only(tiny_model, monkeypatch, caplog):
    texts = ragged_texts(60)
    expected = load(tiny_model, 1).encode(texts)
    encoder = load(tiny_model)
    encoder.budget.tokens = 1200
    forgetful(encoder, monkeypatch, lambda batch: len(batch.ids) > 700)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(encoder.encode(texts), expected, rtol=1e-3, atol=1e-5)
    assert "out of memory at" in caplog.text
    assert 300 <= encoder.budget.tokens <= 700


# --------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("streams", "message"), [(0, "outside 1…2"), (3, "outside 1…2"), (True, "a whole number")]
)
def test_a_number_that_there_cannot_be_is_refused(tiny_model, streams, message):
    with pytest.raises(gen_fast.ConfigError, match=message):
        load(tiny_model, streams)


def test_without_the_compiled_module_there_is_one(tiny_model, monkeypatch):
    monkeypatch.setattr(stream_choice, "unsupported", lambda: "gen_fast._C is not built")
    with pytest.raises(gen_fast.ConfigError, match="is not built"):
        load(tiny_model, 2)
    encoder = load(tiny_model, None)
    monkeypatch.setattr(stream_choice, "PATIENCE", 0)
    monkeypatch.setattr(stream_choice, "candidates", lambda *_: [1, 2])
    assert encoder._streams.choose([9, 9]) == StreamChoice(1)


@pytest.mark.parametrize(
    ("two", "four", "expected"),
    [
        ([1.00, 1.0, 1.00], [1.0, 1.0, 1.0], 1),
        ([0.96, 0.5, 0.97], [1.2, 1.2, 1.2], 1),  # ahead by 4%, and a round that was disturbed
        ([0.90, 0.9, 0.90], [1.0, 1.0, 1.0], 2),
        ([0.90, 0.9, 0.90], [0.8, 0.8, 2.0], 4),
    ],
)
def test_the_fastest_is_taken_if_it_is_clearly_ahead(two, four, expected):
    assert fastest({1: [1.0, 1.0, 1.0], 2: two, 4: four}).count == expected


def test_candidates_share_the_threads_evenly_and_fit_beside_the_weights(tiny_model):
    backbone = load(tiny_model).backbone
    assert candidates(backbone, 1) == [1, 2]
    torch.set_num_threads(12)
    try:
        assert candidates(backbone, 1) == [1, 2, 3, 4, 6, 12]
        tokens = backbone.nbytes // activation_bytes_per_token(backbone)
        assert candidates(backbone, tokens // 4) == [1, 2, 3, 4]
        assert candidates(backbone, tokens) == [1]
    finally:
        torch.set_num_threads(2)


@pytest.mark.parametrize(
    ("count", "gain", "batches", "expected"),
    [
        (1, 1.0, 5, 0),
        (2, 1.3, 1, 0),  # all threads are faster for a batch alone
        (2, 1.3, 6, 6),
        (2, 1.3, 7, 6),
        (4, 1.3, 7, 4),  # 3 · 1.3 < 4
        (4, 1.5, 7, 7),
    ],
)
def test_batches_that_do_not_fill_the_streams_get_all_threads(count, gain, batches, expected):
    assert StreamChoice(count, gain).side_by_side(batches) == expected


@pytest.fixture
def measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[StreamChoice | None]]:
    """The measurements that were made; each takes two streams to be faster."""
    monkeypatch.setenv("GEN_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(stream_choice, "PATIENCE", 1e-3)
    monkeypatch.setattr(stream_choice, "candidates", lambda *_: [1, 2])
    calls: list = []

    def time_streams(run, counts, count):
        run()
        calls.append(counts)
        return {1: [1.0], 2: [0.8]}

    monkeypatch.setattr(stream_choice, "time_streams", time_streams)
    return calls


@needs_module
def test_the_measurement_is_kept_and_a_damaged_one_made_again(tiny_model, measured, caplog):
    caplog.set_level(logging.INFO, "gen_fast.model.stream_choice")
    texts = ragged_texts(60)
    expected = load(tiny_model, 1).encode(texts)
    assert not measured
    encoder = load(tiny_model, None)
    for _ in range(2):
        np.testing.assert_array_equal(encoder.encode(texts), expected)
    assert measured == [[1, 2]]
    assert caplog.text.count("streams: 2, 1.25 times as fast as one") == 1
    load(tiny_model, None).encode(texts)
    assert len(measured) == 1
    load(tiny_model, None, deterministic=True).encode(texts)  # of other batches
    assert len(measured) == 2
    for path in (cache_directory() / "remembered").iterdir():
        if json.loads(path.read_text()).get("key", {}).get("of") == "streams":
            path.write_text(path.read_text().replace('"count": 2', '"count": 9'))
    load(tiny_model, None).encode(texts)
    assert len(measured) == 3


@needs_module
def test_little_work_is_not_measured(tiny_model, measured, monkeypatch):
    encoder = load(tiny_model, None)
    for text in ragged_texts(60):
        encoder.encode(text)
    assert not measured  # single texts, however many
    monkeypatch.setattr(stream_choice, "PATIENCE", 20)
    load(tiny_model, None).encode(ragged_texts(60))
    assert not measured


@needs_module
def test_streams_are_timed_in_turns():
    threads: list[str] = []
    seconds = stream_choice.time_streams(
        lambda: threads.append(threading.current_thread().name), [1, 2], 4
    )
    assert {count: len(times) for count, times in seconds.items()} == {1: 5, 2: 5}
    assert "MainThread" in threads
    assert any(name.startswith("gen_fast-stream") for name in threads)
    assert len(threads) == 2 * 2 + 5 * 2 * (1 + 4)
