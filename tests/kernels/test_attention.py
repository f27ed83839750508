import pytest
import torch

from gen_fast.ops.attention import OP, attention
from gen_fast.ops.attention.reference import attention as reference
from gen_fast.testing import assert_no_worse


def offsets(counts):
    return torch.tensor([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()]).int()


def inputs(q_counts, k_counts, n_prefix, heads, kv_heads, size, dtype):
    torch.manual_seed(0)
    q = torch.randn(sum(q_counts), heads, size).to(dtype)
    # Strided views, as the fused projection gives them.
    kv = torch.randn(sum(k_counts), 2 * kv_heads + 1, size).to(dtype)
    k, v = kv[:, :kv_heads], kv[:, kv_heads : 2 * kv_heads]
    prefix = (
        torch.randn(2, n_prefix, kv_heads, size).to(dtype).unbind() if n_prefix else (None, None)
    )
    return q, k, v, offsets(q_counts), offsets(k_counts), *prefix


def check(arguments, impl, **options):
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    exact = reference(*wide, **options)
    plain = reference(*arguments, **options)
    actual = attention(*arguments, **options, impl=impl)
    assert_no_worse(actual, plain, exact)


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_prefix", [0, 1, 37])
@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_ragged_texts(size, n_prefix, dtype, impl):
    counts = [1, 63, 64, 64, 5, 130]
    check(inputs(counts, counts, n_prefix, 6, 2, size, dtype), impl)


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_prefix", [0, 37])
def test_only_the_last_rows_are_queried(n_prefix, dtype, impl):
    """The trimmed last layer: fewer queries than keys, some texts with none."""
    check(inputs([10, 1, 0, 33], [70, 1, 9, 33], n_prefix, 9, 3, 64, dtype), impl)


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("window", [1, 8, 1000])
def test_sliding_window(window, impl):
    check(inputs([20, 5], [40, 5], 7, 4, 4, 64, torch.float32), impl, window=window)


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
def test_no_texts_and_no_rows(impl):
    assert attention(*inputs([], [], 0, 4, 2, 64, torch.float32), impl=impl).shape == (0, 4, 64)
    empty = inputs([0, 2, 0], [0, 2, 0], 3, 4, 2, 64, torch.float32)
    check(empty, impl)


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
def test_large_scores_stay_finite(impl):
    arguments = list(inputs([50], [50], 20, 2, 1, 64, torch.float32))
    arguments[0] = arguments[0] * 100
    result = attention(*arguments, impl=impl)
    assert torch.isfinite(result).all()


def test_a_text_does_not_see_its_neighbours():
    q, k, v, starts, _ = inputs([30, 40], [30, 40], 0, 4, 2, 64, torch.float64)[:5]
    together = attention(q, k, v, starts, starts)
    alone = attention(q[30:], k[30:], v[30:], offsets([40]), offsets([40]))
    torch.testing.assert_close(together[30:], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 63, 64, 80, 256])
def test_every_instruction_set(isa_level, size, dtype):
    counts = [1, 63, 64, 5, 130]
    for n_prefix in (0, 37):
        check(inputs(counts, counts, n_prefix, 6, 2, size, dtype), "cpu")
    check(inputs([10, 1, 0, 33], [70, 1, 9, 33], 5, 9, 3, size, dtype), "cpu", window=20)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (14, 2), (32, 1), (200, 1)])
def test_group_sizes(heads, kv_heads):
    counts = [70, 3, 40]
    for impl in OP.implementations("cpu"):
        check(inputs(counts, counts, 9, heads, kv_heads, 64, torch.bfloat16), impl)
