"""Products of rows and weights of 8 bits: what both formats must keep."""

import pytest
import torch
from products_of_8_bits import FP8, INT8

import gen_fast
from gen_fast.testing import assert_no_worse

PRODUCTS = (INT8, FP8)


@pytest.mark.parametrize("biased", [False, True])
def test_matches_the_reference(product, dtype, rows, shape, biased, device, impl):
    inputs = product.example(rows, shape, device, dtype, biased)
    reference = product.linear(*inputs, dtype=dtype, impl="reference")
    actual = product.linear(*inputs, dtype=dtype, impl=impl)
    assert_no_worse(actual, reference, product.exact(*inputs))


def test_rows_need_not_be_adjacent(product, device, impl):
    q, *rest = product.example(5, (48, 64), device)
    apart = torch.cat((q, q), 1)[:, : q.shape[1]]
    expected = product.linear(q, *rest, impl=impl)
    torch.testing.assert_close(product.linear(apart, *rest, impl=impl), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(product, bad, device, impl):
    q, scale, *rest = product.example(14, (48, 64), device)
    scale[7] = bad
    y = product.linear(q, scale, *rest, impl=impl)
    assert y.isfinite().all(1).tolist() == [row != 7 for row in range(14)]


# (which argument, what it is not, what the refusal names), of 2 rows and 16 outputs.
WRONG_SCALES_AND_BIASES = [
    (1, torch.ones(3), "2 rows"),
    (1, torch.ones(2).double(), "float64"),
    (3, torch.ones(15), "16 outputs"),
    (4, torch.ones(8), "bias"),
    (4, torch.ones(16).half(), "float16"),
]


@pytest.mark.parametrize(
    ("product", "changed", "value", "message"),
    [
        (INT8, 0, torch.zeros(2, 4), r"int8 \[T, 4\], not torch.float32"),
        (INT8, 0, torch.zeros(2, 8, dtype=torch.int8), r"\[2, 8\]"),
        (INT8, 2, torch.zeros(1, 1, 64, dtype=torch.uint8), "uint8"),
        (INT8, 2, torch.zeros(1, 64, dtype=torch.int8), r"\[1, 64\]"),
        (FP8, 0, torch.zeros(2, 16), r"float8_e4m3fn \[T, 16\], not torch.float32"),
        (FP8, 0, torch.zeros(2, 32).to(torch.float8_e4m3fn), r"\[2, 32\]"),
        (FP8, 2, torch.zeros(16, 16, dtype=torch.int8), "int8"),
        (
            FP8,
            2,
            torch.zeros(24, 16).to(torch.float8_e4m3fn),
            r"multiples of 16, not .*\[24, 16\]",
        ),
        *((product, *case) for product in PRODUCTS for case in WRONG_SCALES_AND_BIASES),
    ],
)
def test_what_does_not_fit_is_refused(product, changed, value, message):
    inputs = list(product.example(2, product.shapes[0]))
    inputs[changed] = value
    with pytest.raises(gen_fast.OpError, match=message):
        product.linear(*inputs, impl=product.op.implementations("cpu")[0])
