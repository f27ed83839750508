"""What is recorded as CUDA graphs on a GPU: here the same functions, on the same memory."""

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.model.batch import DeviceBatch, PackedBatch
from gen_fast.model.buckets import Bucket, bucket_rows
from gen_fast.model.graphs import Graphs, StaticInputs
from gen_fast.model.weights import load_backbone
from gen_fast.testing import no_host_sync, save_tiny_adapter

CPU = torch.device("cpu")


@torch.inference_mode()
@pytest.mark.parametrize("mask", ["causal", "gem"])
def test_a_pass_and_a_step_of_decoding_stop_nobody(tiny_model, mask):
    backbone = load_backbone(tiny_model, packed=True)
    blocks = np.array([(0, 1), (2, 4)]) if mask == "gem" else None
    sequences = [np.arange(3, 9), np.arange(20, 60)]
    prefix = None if blocks is not None else backbone.prefill((4, 5, 6))
    batch = PackedBatch.pack(sequences, needed=[1, 3], prefix_length=3, blocks=blocks)
    expected = backbone.forward(batch, prefix=prefix, mask=mask)
    on_device = batch.device_batch()
    with no_host_sync():
        actual = backbone.run(on_device, prefix=prefix, mask=mask)
    assert torch.equal(actual, expected)
    cache = backbone.new_cache([len(ids) + 2 for ids in sequences])
    backbone.forward(PackedBatch.pack(sequences, blocks=blocks), cache=cache, mask=mask)
    step = cache.place(
        PackedBatch.pack([np.array([5])] * 2, prefix_length=cache.held, blocks=blocks)
    )
    with no_host_sync():
        backbone.run(step, cache=cache, mask=mask)


def test_inputs_stay_where_they_are():
    arrays = {
        "a": np.arange(5),
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "c": np.arange(3, dtype=np.int32),
        "d": np.arange(2) / 3,
    }
    inputs = StaticInputs(arrays, CPU)
    places = {name: x.data_ptr() for name, x in inputs.tensors.items()}
    for _ in range(2):
        arrays = {name: x + x.dtype.type(1) for name, x in arrays.items()}
        inputs.fill(arrays)
        for name, x in inputs.tensors.items():
            assert np.array_equal(x.numpy(), arrays[name])
            assert x.numpy().dtype == arrays[name].dtype
            assert x.data_ptr() == places[name]
            assert x.data_ptr() % 16 == 0


def test_those_used_last_are_kept():
    graphs = Graphs(CPU, most_graphs=2)
    ran = []

    def run(key, size=3):
        def function(tensors):
            ran.append((key, tensors["x"].data_ptr()))
            return tensors["x"] * 2

        result = graphs.run(key, {"x": np.full(size, key)}, function)
        assert result.tolist() == [2 * key] * size

    for key in (1, 2, 1, 3, 1):
        run(key)
    assert len(graphs) == 2
    places = [place for key, place in ran if key == 1]
    assert len(set(places)) == 1
    run(1, size=4)  # another shape is another graph
    assert len(graphs) == 2
    with pytest.raises(ZeroDivisionError):
        graphs.run(9, {"x": np.zeros(1)}, lambda tensors: 1 // 0)
    assert len(graphs) == 2


def test_buckets_are_few_and_hold_their_batches():
    sizes = {bucket_rows(n) for n in range(1, 2049)}
    assert len(sizes) == 24
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, 90, rng.integers(1, 20))
        kind = rng.integers(3)
        needed = [lengths, np.ones_like(lengths), rng.integers(1, lengths + 1)][kind]
        bucket = Bucket.of(lengths, needed)
        rows, counts = bucket.with_padding_texts([np.full(n, 7) for n in lengths], needed)
        arrays = bucket.arrays(rows, counts, 3)
        assert len(rows) == bucket.texts == len(arrays["cu_seqlens"]) - 1
        assert len(arrays["ids"]) == len(arrays["positions"]) == bucket.rows
        assert lengths.sum() <= arrays["cu_seqlens"][-1] <= bucket.rows
        assert (arrays["ids"][: lengths.sum()] == 7).all()
        assert ("needed" in arrays) == (bucket.needed is not None)
        if bucket.needed is not None:
            assert len(arrays["needed"]) == bucket.needed >= arrays["cu_needed"][-1]
        batch = DeviceBatch.of({k: torch.from_numpy(v) for k, v in arrays.items()}, bucket.rows)
        assert batch.longest >= lengths.max()


@pytest.mark.usefixtures("stops_nobody")
@pytest.mark.parametrize("method", ["mean", "weighted-mean", "last-token", "echo", "llm2vec"])
@pytest.mark.parametrize("prompt", [None, "Say it again: "])
def test_padded_batches_give_the_same_embeddings(tiny_model, method, prompt):
    texts = ["a", "two words", "a longer text, of more than one sentence. The other.", "x" * 90] * 5
    plain, padded = (
        gen_fast.load(tiny_model, method=method, dtype="float32", device="cpu", graphs=graphs)
        for graphs in (False, True)
    )
    expected = plain.encode(texts, prompt=prompt)
    for batch_size in (None, 1, 3):
        actual = padded.encode(texts, prompt=prompt, batch_size=batch_size)
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    assert len(padded._graphs) > 1
    exact = gen_fast.load(
        tiny_model, method=method, dtype="float32", device="cpu", deterministic=True, graphs=True
    )
    together = exact.encode(texts, prompt=prompt)
    np.testing.assert_array_equal(together, [exact.encode(text, prompt=prompt) for text in texts])


@pytest.mark.usefixtures("stops_nobody")
def test_special_tokens_and_projections_in_padded_batches(tiny_model, tmp_path):
    save_tiny_adapter(tmp_path / "adapter", tiny_model)
    texts = ["a", "two words", "x" * 90, "a cat in a hat"]
    plain, padded = (
        gen_fast.load(tmp_path / "adapter", dtype="float32", device="cpu", graphs=graphs)
        for graphs in (False, True)
    )
    expected = plain.encode(texts, prompt="Answer: ")
    for batch_size in (None, 1, 3):
        actual = padded.encode(texts, prompt="Answer: ", batch_size=batch_size)
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
