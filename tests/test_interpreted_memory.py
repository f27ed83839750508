"""A test of the tests: seeded faults of kernels are found in the interpreter."""

import pytest
import torch
from interpreted_memory import checked_memory

from gen_fast.ops import gpu

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.skipif(not gpu.interpreted(), reason="needs Triton's interpreter")

ROWS, SIZE = 5, 24


@pytest.fixture(autouse=True)
def _watched(nan_in_fresh_memory):
    with checked_memory():
        yield


@triton.jit
def _twice(
    x, out, x_stride, READ_ROWS: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = 2 x for rows FIRST to ROWS, of SIZE elements; reads READ_ROWS rows."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (column < SIZE) & (row >= FIRST)
    values = tl.load(x + row * x_stride + column, mask=inside & (row < READ_ROWS))
    tl.store(out + row * SIZE + column, 2 * values, mask=inside & (row < ROWS))


def twice(x, read=ROWS, first=0, rows=ROWS, size=SIZE):
    out = x.new_empty(ROWS, SIZE)
    gpu.launch(_twice, (1,), x, out, x.stride(0), read, first, rows, size, 32)
    return out


@pytest.fixture(params=["apart", "adjacent"])
def x(request):
    if request.param == "apart":
        return torch.randn(ROWS + 2, SIZE + 8)[1:-1, 4:-4]
    return torch.randn(ROWS + 2, SIZE)[1:-1]


def test_a_right_kernel_passes(x):
    torch.testing.assert_close(twice(x), 2 * x)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"read": ROWS + 1}, "reads"),
        ({"first": -1, "read": ROWS + 1}, "reads"),
        ({"rows": ROWS + 1}, "writes"),
        ({"size": SIZE + 1}, "reads|writes"),
    ],
)
def test_an_overrun_is_found(fault, what, x):
    """Also where the results are right, since what was read is not used."""
    with pytest.raises(Exception, match=f"that a kernel ({what}) belong to none of its arguments"):
        twice(x, **fault)


@pytest.mark.parametrize("fault", [{"first": 1}, {"rows": ROWS - 1}, {"size": SIZE - 1}])
def test_an_unwritten_element_is_nan(fault, x):
    out = twice(x, **fault)
    assert out.isnan().sum() in (1 * ROWS, SIZE)


def test_what_a_masked_load_leaves_undefined_is_nan(x):
    out = twice(x, read=ROWS - 1)
    assert out[-1].isnan().all()
    assert not out[:-1].isnan().any()


def test_arguments_may_be_scalars_empty_or_absent(x):
    @triton.jit
    def nothing(x, empty, absent, n):
        tl.store(x + n, 0.0)

    out = torch.ones(3)
    gpu.launch(nothing, (1,), out, out.new_empty(0), None, 2)
    assert out.tolist() == [1, 1, 0]
    with pytest.raises(Exception, match="a kernel writes"):
        gpu.launch(nothing, (1,), out, out.new_empty(0), None, 3)
