"""What only a CUDA device can show: `make gpu-check` runs these, and the ops' own tests."""

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.model.batch import PackedBatch
from gen_fast.model.decoding import Decoder
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.ops import all_ops
from gen_fast.ops.append import append
from gen_fast.ops.attention import AttentionOptions, attention
from gen_fast.ops.norm import add_rms_norm
from gen_fast.ops.swiglu import swiglu
from gen_fast.testing import relative_error, save_tiny_adapter
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Example
from gen_fast.training.step import accumulate
from gen_fast.training.student import Student
from gen_fast.training.world import World

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
        assert op.choose("cuda", torch.bfloat16).name == "triton", name


@pytest.fixture
def adapter(tiny_model, tmp_path):
    save_tiny_adapter(tmp_path / "adapter", tiny_model)
    return tmp_path / "adapter"


def test_special_tokens_and_projections_give_the_embeddings_of_the_cpu(adapter):
    cpu, gpu = (
        gen_fast.load(adapter, device=device, dtype="float32").encode(TEXTS, prompt="Answer: ")
        for device in ("cpu", "cuda")
    )
    assert np.abs(cpu - gpu).max() <= 1e-4 * np.abs(cpu).max()


def test_decoding_writes_what_the_cpu_writes(tiny_model):
    prompts = [np.array(ids) for ids in ([5], [9, 40, 7, 7, 100, 3], list(range(30, 60)))]
    written = []
    for device in ("cpu", "cuda"):
        backbone = load_backbone(tiny_model, device=device)
        decoded = Decoder(backbone, load_head(tiny_model, backbone), [1]).decode(
            prompts, 8, prefix=backbone.prefill((4, 9, 77))
        )
        written.append([ids.tolist() for ids, _ in decoded])
    assert written[0] == written[1]


def test_a_training_step_has_the_losses_and_gradients_of_the_cpu(tiny_model):
    config = TrainConfig(answers=("-",), teacher="-", out="-", n_compression=3, n_thought=2)
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(3, 200, n), rng.integers(3, 200, m), rng.normal(size=16, scale=0.1))
        for n, m in ((5, 9), (40, 1), (1, 30))
    ]
    found = []
    for device in ("cpu", "cuda"):
        backbone = load_backbone(tiny_model, device=device)
        student = Student(backbone, load_head(tiny_model, backbone), 16, config)
        if found:  # the same start, to the bit
            student.load_state_dict(found[0][1])
        start = {name: x.detach().clone() for name, x in student.state_dict().items()}
        losses, _ = accumulate(student, examples, config, World())
        grads = {name: p.grad.cpu() for name, p in student.named_parameters()}
        found.append((losses, start, grads))
    (cpu, _, expected), (gpu, _, actual) = found
    assert gpu.reconstruction == pytest.approx(cpu.reconstruction, rel=1e-5)
    assert gpu.alignment == pytest.approx(cpu.alignment, rel=1e-5)
    for name, grad in expected.items():
        assert relative_error(actual[name], grad) <= 1e-4, name


@pytest.mark.parametrize("op", ["append", "norm", "swiglu"])
def test_rows_beyond_two_billion_elements(op):
    rows, size = (1 << 31) // 4096 + 64, 4096
    x = torch.empty(rows, size, dtype=torch.bfloat16, device="cuda").normal_()
    last = slice(rows - 8, rows)
    if op == "append":
        ids = torch.arange(rows, device="cuda")
        assert torch.equal(append(x, None, ids)[last], x[last])
    elif op == "norm":
        weight = torch.ones(size, dtype=torch.bfloat16, device="cuda")
        few = add_rms_norm(x[last], x[last], weight, 1e-6)
        many = add_rms_norm(x, x, weight, 1e-6)
        assert all(torch.equal(a[last], b) for a, b in zip(many, few, strict=True))
    else:
        assert torch.equal(swiglu(x)[last], swiglu(x[last]))


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
        # Other texts of the same lengths in the same memory.
        batch.ids.copy_(batch.ids.flip(0))
        graph.replay()
        assert torch.equal(captured, backbone.forward(batch, prefix=prefix))
        assert not torch.equal(captured, expected)


def test_measured_tiles_give_the_results_of_the_pinned_ones(monkeypatch):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 300, 4, 64, dtype=torch.bfloat16, device="cuda").unbind()
    offsets = torch.tensor([0, 1, 120, 300], device="cuda").int()
    results = []
    for tuned in ("0", "1"):
        monkeypatch.setenv("GEN_FAST_AUTOTUNE", tuned)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, AttentionOptions(offsets, offsets))
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for pinned, measured in zip(*results, strict=True):
        assert relative_error(measured, pinned) <= 2e-2
