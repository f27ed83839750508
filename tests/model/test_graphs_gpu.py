"""CUDA graphs against the same batches without: numbers, and the time of a query and a token."""

import time

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.model.decoding import Decoder
from gen_fast.model.graphs import Graphs
from gen_fast.model.sampling import GREEDY, Sampling
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.testing import save_tiny_adapter, save_tiny_model

pytestmark = pytest.mark.gpu

TEXTS = ["a", "two words", "a longer text, of more than one sentence. The other.", "x" * 90]
# Deep enough to be launch-bound, and quick to make.
DEEP = {
    "num_hidden_layers": 28,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def milliseconds(run, rounds=30):
    """Of the fastest run, from call to result on the host."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


@pytest.mark.parametrize("method", ["mean", "weighted-mean", "last-token", "adapter"])
def test_graphs_give_the_embeddings_of_plain_batches(tiny_model, tmp_path, method):
    model, options = tiny_model, {"method": method}
    if method == "adapter":
        save_tiny_adapter(tmp_path / "adapter", tiny_model)
        model, options = tmp_path / "adapter", {}
    plain, graphs = (
        gen_fast.load(model, device="cuda", dtype="float32", graphs=use, **options)
        for use in (False, True)
    )
    for prompt in (None, "Say it again: "):
        expected = plain.encode(TEXTS, prompt=prompt)
        for batch_size in (None, 1, 3):
            for _ in range(3):  # as it is, recorded, replayed
                actual = graphs.encode(TEXTS, prompt=prompt, batch_size=batch_size)
                np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    assert all(graph._recorded for graph in graphs._graphs._kept.values())
    exact = gen_fast.load(model, device="cuda", dtype="bfloat16", deterministic=True, **options)
    first = exact.encode(TEXTS)
    for _ in range(3):
        np.testing.assert_array_equal(exact.encode(TEXTS), first)
        np.testing.assert_array_equal([exact.encode(text) for text in TEXTS], first)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.3, 0.95, 40)], ids=["greedy", "sampled"])
def test_graphs_write_the_texts_of_plain_steps(tiny_model, sampling):
    rng = np.random.default_rng(3)
    rows = [rng.integers(3, 250, n) for n in rng.integers(1, 40, 23)]
    uniform = rng.random((len(rows), 20))
    written = []
    for use in (False, True):
        backbone = load_backbone(tiny_model, device="cuda")
        backbone.use_graphs = use
        decoder = Decoder(backbone, load_head(tiny_model, backbone), range(0, 260, 10))
        with torch.inference_mode():
            decoded = decoder.decode(
                rows,
                20,
                sampling,
                prefix=backbone.prefill((4, 9, 77)),
                uniform=uniform,
                batch_size=5,
            )
        written.append([(ids.tolist(), why) for ids, why in decoded])
    assert written[0] == written[1]


def test_what_stops_the_host_cannot_be_recorded_and_says_so():
    graphs = Graphs(torch.device("cuda"))

    def stops(tensors):
        return tensors["x"] * tensors["x"].sum().item()

    graphs.run(0, {"x": np.ones(3)}, stops)
    with pytest.raises(RuntimeError, match="captur"):
        graphs.run(0, {"x": np.ones(3)}, stops)
    assert len(graphs) == 0
    # The GPU goes on.
    for _ in range(3):
        result = graphs.run(1, {"x": np.ones(3)}, lambda tensors: tensors["x"] * 2)
        assert result.tolist() == [2, 2, 2]


def test_memory_of_graphs_is_bounded():
    graphs = Graphs(torch.device("cuda"), most_bytes=64 << 20)
    for size in range(8):
        for _ in range(3):
            result = graphs.run(
                size,
                {"x": np.full(1, size, dtype=np.float32)},
                lambda tensors, n=size: tensors["x"].expand(16 << 20).clone()[: n + 1] + 1,
            )
            assert result.tolist() == [size + 1] * (size + 1)
    assert graphs._recorder.nbytes <= 64 << 20


def test_time_of_a_query_and_of_a_token(tmp_path, capsys):
    save_tiny_model(tmp_path, "llama-tied", **DEEP)
    lines, texts, rows = [], ["what is the cat in the hat about?"] * 8, [np.arange(3, 20)] * 8
    for use in (False, True):
        encoder = gen_fast.load(
            tmp_path, method="mean", device="cuda", dtype="bfloat16", graphs=use
        )
        query = milliseconds(lambda e=encoder: e.encode(texts[0]))
        exact = gen_fast.load(
            tmp_path,
            method="mean",
            device="cuda",
            dtype="bfloat16",
            deterministic=True,
            graphs=use,
        )
        each = milliseconds(lambda e=exact: e.encode(texts), 10) / len(texts)
        backbone = encoder.backbone
        decoder = Decoder(backbone, load_head(tmp_path, backbone), [])
        with torch.inference_mode():
            token = milliseconds(lambda d=decoder: d.decode(rows, 100), 4) / 100
        lines.append(
            f"graphs={use}: a query {query:.2f} ms, a text alone (deterministic) {each:.2f} ms, "
            f"a step of decoding 8 rows {token:.2f} ms"
        )
    with capsys.disabled():
        print("", *lines, sep="\n")
