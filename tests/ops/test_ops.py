"""Choosing implementations, and the promise that one name serves everywhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gen_fast
from gen_fast import ops
from gen_fast.ops import native
from gen_fast.ops.append import append
from gen_fast.ops.attention import OP as ATTENTION
from gen_fast.ops.attention import AttentionOptions, attention
from gen_fast.ops.distill import distill
from gen_fast.ops.norm import add_rms_norm
from gen_fast.ops.pool import pool
from gen_fast.ops.rope import rope
from gen_fast.ops.swiglu import swiglu

ROOT = Path(__file__).parents[2]


def stems(pattern, prefix=""):
    return {path.stem.removeprefix(prefix) for path in ROOT.glob(pattern)}


def test_one_stem_everywhere():
    """kernels/<op>, csrc/*/<op>, tests/kernels/test_<op>, bench/kernels/bench_<op>."""
    folders = {path.parent.name for path in ROOT.glob("kernels/*/op.py")}
    assert folders == set(ops.OP_NAMES)
    assert not (ROOT / "kernels" / "__init__.py").exists()  # would shadow the `kernels` package
    for folder in folders:
        files = {path.name for path in (ROOT / "kernels" / folder).iterdir()}
        assert {"__init__.py", "reference.py", "op.py", "README.md"} <= files, folder
    # A gradient, tiles, or a kind of weights, may be long enough for a file of its own.
    parts = re.compile("_(backward|tiles|groups|8_bits|int8|fp8)$")
    assert {parts.sub("", stem) for stem in stems("tests/kernels/test_*.py", "test_")} == folders
    assert stems("bench/kernels/bench_*.py", "bench_") <= folders
    assert {parts.sub("", stem) for stem in stems("csrc/cpu/*.cpp")} <= folders
    assert stems("csrc/cuda/*.cu") <= folders


def test_forced_implementation_that_is_missing_is_an_error(monkeypatch):
    with pytest.raises(gen_fast.ImplementationError, match="'turbo' does not exist"):
        swiglu(torch.ones(1, 2), impl="turbo")
    monkeypatch.setattr(ops, "FORCED", "turbo")
    with pytest.raises(gen_fast.ImplementationError, match="'turbo' does not exist"):
        swiglu(torch.ones(1, 2))


def test_forced_implementation_on_the_wrong_device_is_an_error():
    with pytest.raises(gen_fast.ImplementationError, match="runs on cpu, not on meta"):
        ATTENTION.choose("meta", torch.float32, impl="sdpa")


def test_a_list_takes_the_first_that_an_op_has(monkeypatch):
    monkeypatch.setattr(ops, "FORCED", "sdpa, reference")
    assert ATTENTION.choose("cpu", torch.float32).name == "sdpa"
    assert torch.equal(swiglu(torch.zeros(1, 2)), torch.zeros(1, 1))


@pytest.fixture
def example(request):
    """An op of its own for each test: a schema can be defined only once."""
    return ops.Op(request.node.name, "(Tensor x) -> Tensor", torch.empty_like)


def test_what_an_implementation_does_not_take_falls_to_the_next(example):
    example.register("reference")(lambda x: "reference")
    floats = (torch.float32,)
    example.register("fast", lambda case: ops.unsupported(case, "cpu", floats))(lambda x: "fast")
    plain, half = torch.zeros(1), torch.zeros(1, dtype=torch.float16)
    assert [example(x) for x in (plain, half)] == ["fast", "reference"]
    with pytest.raises(gen_fast.ImplementationError, match=r"does not take torch\.float16"):
        example(half, impl="fast")


def test_an_op_without_a_gradient_says_so_when_one_is_asked_for(example):
    example.register("reference")(torch.clone)
    trained = torch.zeros(1, requires_grad=True)
    with pytest.raises(gen_fast.ImplementationError, match="has no gradient"):
        example(trained)
    with torch.no_grad():
        assert example(trained) == 0


def test_a_forced_implementation_without_a_backward_pass_is_an_error_at_once(example):
    example.backward = ops.Op("halfway", "(Tensor x) -> Tensor", torch.empty_like)
    example.backward.register("reference")(torch.clone)
    example.register("fast")(torch.clone)
    with pytest.raises(gen_fast.ImplementationError, match=r"'halfway': .*'fast' does not exist"):
        example(torch.zeros(1, requires_grad=True), impl="fast")


def test_an_emulation_is_never_chosen_but_can_be_forced(example):
    example.register("reference")(lambda x: "reference")
    example.register("gpu", lambda case: None if case.forced else "is slow")(lambda x: "emulated")
    assert example(torch.zeros(1)) == "reference"
    assert example(torch.zeros(1), impl="gpu") == "emulated"


def test_the_choice_is_logged_once(example, caplog):
    example.register("reference")(lambda x: 1)
    example.register("fast", lambda case: "is not built")(lambda x: 2)
    with caplog.at_level("INFO"):
        assert example(torch.zeros(1)) == 1
        assert example(torch.zeros(1)) == 1
    (record,) = caplog.records
    assert record.message == f"{example.name} on cpu in torch.float32: reference"
    with pytest.raises(gen_fast.ImplementationError, match="is not built"):
        example(torch.zeros(1), impl="fast")


def block(x, residual, weight, gate_up, table, special, ids):
    """A few ops in a row, as a model has them, with a scalar at the end."""
    stream = append(table, special, ids) + x
    normed, stream = add_rms_norm(stream, residual, weight, 1e-6)
    heads = (normed @ gate_up).unflatten(-1, (4, 8))
    angles = torch.arange(12.0, device=x.device).view(3, 4)
    turned = rope(heads, angles.cos(), angles.sin())
    offsets = torch.tensor([0, 1, 3], device=x.device).int()
    mixed = attention(turned, turned, heads, AttentionOptions(offsets, offsets)).flatten(1)
    student = swiglu(mixed) + stream
    with torch.no_grad():
        teacher = pool(student, offsets, weight, 1e-6)
    losses = distill(stream, table, ids % 7, student[1:], teacher)
    return student.square().sum() + losses[0] + losses[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_compile_traces_through_every_op_and_its_gradient(device):
    torch.manual_seed(0)
    shapes = [(3, 16), (3, 16), (16,), (16, 32), (7, 16), (2, 16)]
    inputs = [torch.randn(shape).to(device) for shape in shapes]
    ids = torch.tensor([7, 3, 8], device=device)

    def gradients(function):
        trained = [inputs[0].clone().requires_grad_(), inputs[5].clone().requires_grad_()]
        value = function(trained[0], *inputs[1:5], trained[1], ids)
        return value, *torch.autograd.grad(value, trained)

    # Any break of the graph would be an error; AOT compiles forward and backward without a C
    # compiler.
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled), gradients(block))


def test_a_process_takes_what_its_environment_forces_and_no_triton():
    code = """
import sys
from gen_fast.ops import all_ops
from gen_fast.ops.swiglu import OP, op
all_ops()
print(OP.choose("cpu", op.torch.float32).name, "triton" in sys.modules)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "GEN_FAST_IMPL": "turbo,reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "reference False\n"


@pytest.mark.skipif(native.missing() is not None, reason="needs the C++ ops")
@pytest.mark.parametrize(
    ("dtype", "gate_up"),
    [
        (torch.float16, torch.ones(1, 4).half()),
        ("bfloat16", torch.ones(1, 4).bfloat16()),
        (torch.float32, 0),
        (torch.float32, torch.ones(1, 4).numpy()),
    ],
)
def test_compiled_ops_refuse_other_dtypes_and_what_is_no_tensor(dtype, gate_up):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.module().swiglu(dtype, gate_up, torch.ones(1, 2), 1, 2)


class WithoutMemory:
    def data_ptr(self):
        raise RuntimeError("has no memory")


@pytest.mark.skipif(native.missing() is not None, reason="needs the C++ ops")
def test_why_a_tensor_has_no_address_is_said():
    with pytest.raises(RuntimeError, match="has no memory"):
        native.module().swiglu(torch.float32, WithoutMemory(), torch.ones(1, 2), 1, 2)
