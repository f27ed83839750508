"""Choosing implementations, and the promise that one name serves everywhere."""

from pathlib import Path

import pytest
import torch

import gen_fast
from gen_fast import ops
from gen_fast.ops.attention import OP as ATTENTION
from gen_fast.ops.swiglu import swiglu

ROOT = Path(__file__).parents[1]


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
    assert stems("tests/kernels/test_*.py", "test_") == folders
    assert stems("bench/kernels/bench_*.py", "bench_") <= folders
    assert stems("csrc/cpu/*.cpp") <= folders
    assert stems("csrc/cuda/*.cu") <= folders


def test_forced_implementation_that_is_missing_is_an_error(monkeypatch):
    with pytest.raises(gen_fast.ImplementationError, match="'turbo' does not exist"):
        swiglu(torch.ones(1, 2), impl="turbo")
    monkeypatch.setenv("GEN_FAST_IMPL", "turbo")
    with pytest.raises(gen_fast.ImplementationError, match="'turbo' does not exist"):
        swiglu(torch.ones(1, 2))


def test_forced_implementation_on_the_wrong_device_is_an_error():
    with pytest.raises(gen_fast.ImplementationError, match="runs on cpu, not on meta"):
        ATTENTION.choose("sdpa", torch.empty(0, device="meta"))


def test_a_list_takes_the_first_that_an_op_has(monkeypatch):
    monkeypatch.setenv("GEN_FAST_IMPL", "sdpa, reference")
    assert ATTENTION.choose(None, torch.zeros(1)).__module__.endswith("sdpa")
    assert torch.equal(swiglu(torch.zeros(1, 2)), torch.zeros(1, 1))


def test_what_an_implementation_does_not_take_falls_to_the_next_and_is_an_error_when_forced():
    op = ops.Op("example")
    op.register("reference")(lambda: "reference")
    op.register("fast", dtypes=(torch.float32,), differentiable=False)(lambda: "fast")
    plain, half = torch.zeros(1), torch.zeros(1, dtype=torch.float16)
    trained = torch.zeros(1, requires_grad=True)
    assert [op.choose(None, x)() for x in (plain, half, trained)] == ["fast"] + 2 * ["reference"]
    with torch.no_grad():
        assert op.choose(None, trained)() == "fast"
    with pytest.raises(gen_fast.ImplementationError, match=r"does not take torch\.float16"):
        op.choose("fast", half)
    with pytest.raises(gen_fast.ImplementationError, match="has no gradient"):
        op.choose("fast", trained)


def test_the_choice_is_logged_once(caplog):
    op = ops.Op("example")
    op.register("reference")(lambda: 1)
    op.register("fast", devices=("cpu",), missing=lambda: "is not built")(lambda: 2)
    with caplog.at_level("INFO"):
        assert op.choose(None, torch.zeros(1))() == 1
        assert op.choose(None, torch.zeros(1))() == 1
    assert [r.message for r in caplog.records] == ["example on cpu in torch.float32: reference"]
    with pytest.raises(gen_fast.ImplementationError, match="is not built"):
        op.choose("fast", torch.zeros(1))
