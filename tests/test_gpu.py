"""What only a CUDA device can show: `make gpu-check` runs these, and the ops' own tests."""

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.batching import PackedBatch
from gen_fast.ops import all_ops

pytestmark = pytest.mark.gpu

TEXTS = ["a", "two words", "a longer text, of more than one sentence. This is the other.", "x" * 90]


def test_embeddings_equal_those_of_the_cpu(tiny_model):
    for prompt in (None, "Say it again: "):
        results = [
            gen_fast.load(tiny_model, device=device, dtype="float32").encode(TEXTS, prompt=prompt)
            for device in ("cpu", "cuda")
        ]
        assert np.abs(results[0] - results[1]).max() <= 1e-4 * np.abs(results[0]).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(tiny_model, dtype):
    exact = gen_fast.load(tiny_model, device="cpu", dtype="float32").encode(TEXTS)
    actual = gen_fast.load(tiny_model, device="cuda", dtype=dtype).encode(TEXTS)
    a, b = actual - exact.mean(0), exact - exact.mean(0)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.99


def test_triton_is_chosen_on_a_gpu():
    for name, op in all_ops().items():
        assert op.chosen("cuda", torch.bfloat16) == "triton", name


def test_a_forward_pass_waits_for_nothing_and_fits_a_cuda_graph(tiny_model):
    backbone = gen_fast.load(tiny_model, device="cuda", dtype="bfloat16").backbone
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 200, n) for n in (5, 40, 1, 17)]
    batch = PackedBatch.pack(sequences, needed=[1, 2, 1, 0], device="cuda")
    prefix = backbone.prefill((5, 6, 7))
    with torch.inference_mode():
        expected = backbone.forward(batch, prefix=prefix)  # compiles, and grows the rotary table
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = backbone.forward(batch, prefix=prefix)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(again, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = backbone.forward(batch, prefix=prefix)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
