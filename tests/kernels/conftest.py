"""Every test of an op runs for every implementation that can run here, on the CPU and on a GPU.

In Triton's interpreter, where a case takes seconds, a test runs for every pair of its parameters'
values, but for those that its module names in SLOW_IN_INTERPRETER; the other combinations are slow
tests. On a GPU and in C++ all of them run.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from interpreted_memory import checked_memory
from products_of_8_bits import Product
from torch import Tensor

from gen_fast.errors import ImplementationError
from gen_fast.ops import Op, gpu
from gen_fast.ops.qlinear.reference import FORMATS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise (device, impl) over a module's OP; `grad_impl` over those with a backward op.

    `quantized_impl` goes over its QUANTIZED. A test that also takes `row_format` runs for each
    of them, and is skipped, with the reason, where the implementation refuses one. For one that
    takes `product`, see `over_products`.
    Triton runs on the CPU in its interpreter (see tests/conftest.py).
    """
    if {"product", "impl"} <= set(metafunc.fixturenames):
        over_products(metafunc)
        return
    for name in {"impl", "grad_impl", "quantized_impl"} & set(metafunc.fixturenames):
        which = "QUANTIZED" if name == "quantized_impl" else "OP"
        ops: list[Op] = [getattr(metafunc.module, which)]
        if name == "grad_impl":
            ops.append(metafunc.module.OP.backward)
        cases = implementations(ops)
        if "row_format" in metafunc.fixturenames:
            cases = [with_format(ops[0], case, x) for case in cases for x in FORMATS]
            metafunc.parametrize(("device", name, "row_format"), cases)
        else:
            metafunc.parametrize(("device", name), cases)


def implementations(ops: Sequence[Op]) -> list[ParameterSet]:
    """(device, implementation) of what all of `ops` have; those on a GPU are marked."""
    cases = []
    for device in ("cpu", "cuda"):
        shared = set.intersection(*(set(op.implementations(device)) for op in ops))
        for impl in ops[0].implementations(device):
            if impl in shared:
                marks = [pytest.mark.gpu] if device == "cuda" else []
                cases.append(pytest.param(device, impl, id=f"{device}-{impl}", marks=marks))
    return cases


def over_products(metafunc: pytest.Metafunc) -> None:
    """Parametrise over a module's PRODUCTS, each with the implementations of its own op.

    A test that takes `dtype`, `rows` or `shape` runs for all of those that the product lists.
    """
    listed = {"dtype": "dtypes", "rows": "rows", "shape": "shapes"}
    names = [name for name in listed if name in metafunc.fixturenames]
    cases = []
    products: Sequence[Product] = metafunc.module.PRODUCTS
    for product in products:
        lists = [getattr(product, listed[name]) for name in names]
        for case in implementations([product.op]):
            for values in itertools.product(*lists):
                x = "-".join(map(str, (case.id, product.name, *values)))
                cases.append(pytest.param(*case.values, product, *values, id=x, marks=case.marks))
    metafunc.parametrize(("device", "impl", "product", *names), cases)


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what runs in Triton's interpreter and adds no pair of values."""
    tests: dict[str, list[tuple[pytest.Item, dict[str, Any]]]] = defaultdict(list)
    for item in items:
        spec = getattr(item, "callspec", None)
        if spec is None or "tests/kernels" not in item.nodeid:
            continue
        values = dict(spec.params)
        impls = [values.pop(name, None) for name in ("impl", "grad_impl", "quantized_impl")]
        if "triton" in impls and values.pop("device") == "cpu":
            slow = getattr(item.module, "SLOW_IN_INTERPRETER", {})
            if any(values.get(name) in slow[name] for name in slow):
                item.add_marker(pytest.mark.slow)
                continue
            tests[item.nodeid.partition("[")[0]].append((item, values))
    for cases in tests.values():
        kept = pairwise([values for _, values in cases])
        for number, (item, _) in enumerate(cases):
            if number not in kept:
                item.add_marker(pytest.mark.slow)


def pairwise(cases: Sequence[dict[str, Any]]) -> set[int]:
    """Numbers of cases that together have every pair of parameter values that occurs."""
    pairs = [
        set(itertools.combinations([(name, str(x)) for name, x in c.items()], 2)) for c in cases
    ]
    if any(len(case) < 2 for case in cases):
        return set(range(len(cases)))
    kept, missing = set(), set().union(*pairs)
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))
        kept.add(best)
        missing -= pairs[best]
    return kept


def with_format(op: Op, case: ParameterSet, row_format: str) -> ParameterSet:
    """`case`, (device, implementation), with a format to quantise to."""
    device, impl = case.values
    marks = list(case.marks)
    try:
        op.choose(device, torch.bfloat16, row_format, impl)
    except ImplementationError as error:
        marks.append(pytest.mark.skip(reason=str(error)))
    return pytest.param(device, impl, row_format, id=f"{case.id}-{row_format}", marks=marks)


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(nan_in_fresh_memory):
    """In every test of an op."""


@pytest.fixture(autouse=True)
def _checked_memory():
    """In every test of an op that runs in Triton's interpreter."""
    with checked_memory() if gpu.interpreted() else nullcontext():
        yield


@pytest.fixture
def with_carry():
    """Undo a fault of Triton's interpreter: rounding to fp8 loses the carry into the exponent.

    127 becomes 64 there, not 128 (seen with Triton 3.7.0); compiled kernels round in hardware.
    """

    def restore(q: Tensor, exact: Tensor) -> Tensor:
        """`q` doubled where that is what brings it within a rounding of `exact`."""
        if q.is_cuda or q.dtype != torch.float8_e4m3fn:
            return q.float()
        value = q.float()
        lost = (2 * value - exact).abs() < (value - exact).abs()
        return torch.where(lost, 2 * value, value)

    return restore
