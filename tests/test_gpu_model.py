"""The model of GPUs counts the bytes that the ops move, and says everywhere that it is a model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gen_fast.ops.append.reference import append
from gen_fast.ops.norm.reference import add_rms_norm, add_rms_norm_quantized
from gen_fast.ops.pool.reference import pool
from gen_fast.ops.rope.reference import rope
from gen_fast.ops.swiglu.reference import swiglu, swiglu_quantized

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # last: its names hide nobody's
import gpu_model  # noqa: E402
import gpu_ops  # noqa: E402

SHAPES = {shape.name: shape for shape in gpu_ops.SHAPES}
MEMORY_BOUND = (
    "append", "norm", "norm_quantized", "rope", "swiglu", "swiglu_quantized", "pool",
)  # fmt: skip
ROWS = 40


def bytes_of(row):
    """What a row of the results counted, and x, which was left out of rope's gradient."""
    if row["op"] != "rope" or "backward" not in row["mode"]:
        return row["bytes"]
    shape = SHAPES[row["size"]]
    heads = shape.heads + shape.kv_heads
    return row["bytes"] + 2 * gpu_model.KERNEL_ROWS[row["size"]] * heads * shape.head_dim


def recorded():
    """(op, shape, mode, bytes) of the memory-bound ops' rows in the results."""
    rows = {
        (row["op"], row["size"], row["mode"], bytes_of(row))
        for file in gpu_model.MEASURED["H100"]
        for row in json.loads((gpu_model.RESULTS / file).read_text())["kernels"]
        if row["op"] in MEMORY_BOUND and row["provider"] == "triton"
    }
    return sorted(rows)


@pytest.mark.parametrize(("op", "size", "mode", "counted"), recorded())
def test_bytes_are_those_that_the_benchmarks_counted(op, size, mode, counted):
    rows = gpu_model.KERNEL_ROWS[size]
    ops = gpu_ops.case(op, SHAPES[size], rows, backward="backward" in mode)
    assert sum(op.bytes for op in ops) == pytest.approx(counted, rel=0.05)


def test_every_memory_bound_op_is_recorded_at_both_sizes():
    found = {(op, size) for op, size, _, _ in recorded()}
    assert found == {(op, size) for op in MEMORY_BOUND for size in gpu_model.KERNEL_ROWS}


def normal(*shape):
    return torch.randn(shape).bfloat16()


def reference_call(op, shape):
    """The plain reference and its arguments."""
    hidden, wide = shape.hidden, shape.feed_forward
    x, residual, weight = normal(ROWS, hidden), normal(ROWS, hidden), normal(hidden)
    heads = shape.heads + shape.kv_heads
    angles = torch.rand(ROWS, shape.head_dim // 2)
    offsets = torch.arange(0, ROWS + 1, gpu_ops.COMPRESSION, dtype=torch.int32)
    return {
        "append": (append, (normal(ROWS, hidden), None, torch.arange(ROWS))),
        "norm": (add_rms_norm, (x, residual, weight, 1e-6)),
        "norm_quantized": (add_rms_norm_quantized, (x, residual, weight, 1e-6, "int8")),
        "rope": (
            rope,
            (normal(ROWS, heads, shape.head_dim), angles, angles.sin(), normal(heads, 128), 1e-6),
        ),
        "swiglu": (swiglu, (normal(ROWS, 2 * wide),)),
        "swiglu_quantized": (swiglu_quantized, (normal(ROWS, 2 * wide), "int8")),
        "pool": (pool, (x, offsets, weight, 1e-6, None)),
    }[op]


@pytest.mark.parametrize("size", ["qwen3-0.6b", "qwen3-8b"])
@pytest.mark.parametrize("op", MEMORY_BOUND)
def test_bytes_are_those_of_the_references_inputs_and_results(op, size):
    shape = SHAPES[size]
    function, arguments = reference_call(op, shape)
    results = function(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    # Vectors among the arguments are weights and offsets, which do not grow with the rows.
    activations = [v for v in arguments if isinstance(v, torch.Tensor) and v.dim() > 1]
    if op == "rope":
        activations = activations[:3]  # without the weight of its norm
    counted = sum(tensor.nbytes for tensor in [*activations, *results])
    ops = gpu_ops.case(op, shape, ROWS, backward=False)
    assert sum(op.bytes for op in ops) == pytest.approx(counted, rel=0.05)


def test_more_bandwidth_or_fewer_bytes_take_no_longer():
    shape = SHAPES["qwen3-8b"]
    h200, h100 = gpu_model.GPUS[:2]
    for op in gpu_ops.layer(shape, 65536, 65536 * 128):
        assert gpu_model.seconds(op, h200, 4096)[0] <= gpu_model.seconds(op, h100, 4096)[0]
    assert gpu_model.seconds(gpu_ops.norm(shape, 1), h100, 4096)[1] == "launch"
    assert gpu_model.seconds(gpu_ops.norm(shape, 65536), h100, 4096)[1] == "memory"
    assert gpu_model.seconds(gpu_ops.product("", 65536, 4096, 4096), h100, 4096)[1] == "compute"


def test_an_encoded_token_costs_the_flops_that_the_measured_rows_carry():
    """Without attention's own, which an MFU does not count."""
    file = gpu_model.RESULTS / gpu_model.MEASURED["H100"][-1]
    row = next(r for r in json.loads(file.read_text())["encode"] if r["shape"] == "qwen3-8b")
    length = row["tokens"] / row["texts"]
    ops = gpu_ops.forward(SHAPES["qwen3-8b"], row["texts"], length)
    flops = sum(op.flops for op in ops if "product" in op.name)
    assert flops == pytest.approx(row["flops"], rel=1e-3)


def test_every_table_says_that_it_is_a_model(tmp_path):
    file = tmp_path / "model.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench/gpu_model.py"), "--json", str(file)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    printed = done.stdout.splitlines()
    titles = [line for line in printed if line.startswith("### ")]
    assert len(titles) == sum(line.startswith("|---") for line in printed) >= 8
    assert all("Model, not a measurement" in title for title in titles)
    assert [f"### {title}" for title in json.loads(file.read_text())] == titles
    ratios = [row["model / measured"] for row in json.loads(file.read_text())[titles[-1][4:]]]
    assert len(ratios) > 30
