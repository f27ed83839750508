import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.attention import BACKWARD, OP, AttentionOptions
from gen_fast.ops.attention import attention as fast
from gen_fast.ops.attention.reference import attention as reference
from gen_fast.ops.attention.reference import visible
from gen_fast.ops.dropout.philox import HEADS, kept
from gen_fast.testing import assert_no_worse, check_gradients


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


def attention(q, k, v, *settings, impl=None, **named):
    """The op on flat arguments, which are easy to move and to convert one by one."""
    return fast(q, k, v, AttentionOptions(*settings, **named), impl=impl)


def plain(q, k, v, *settings, **named):
    return reference(q, k, v, AttentionOptions(*settings, **named))[0]


def moved(x, device):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def check(arguments, device, impl, **options):
    arguments = [moved(x, device) for x in arguments]
    options = {name: moved(x, device) for name, x in options.items()}
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    actual = attention(*arguments, **options, impl=impl)
    assert_no_worse(actual, plain(*arguments, **options), plain(*wide, **options))


def check_backward(arguments, device, impl, **options):
    q, k, v, *rest = arguments
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = {name: moved(x, device) for name, x in options.items()}

    def run(*leaves, impl):
        return attention(*leaves, **options, impl=impl)

    check_gradients(run, lambda *x: plain(*x, **options), (*leaves, *rest), impl, device)


# Slow in Triton's interpreter: heads of 80, 96 and 128 have one tile.
SLOW_IN_INTERPRETER = {"size": (96, 128), "n_prefix": (1,)}
DTYPES = (torch.bfloat16, torch.float32)  # Triton's interpreter is faster in the first
# window, mask, blocks, dropout, seed, layer, text_keys: as torch.ops takes the last options.
CAUSAL = (None, "causal", None, 0.0, 0, 0, None)
RAGGED = [1, 63, 64, 64, 5, 130]
# (queries, keys) of each text: the trimmed last layer, some texts with no query, some empty.
TRIMMED = ([10, 1, 0, 33, 0], [70, 1, 9, 33, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_prefix", [0, 1, 37])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_ragged_texts(size, n_prefix, dtype, device, impl):
    check(inputs(RAGGED, RAGGED, n_prefix, 4, 2, size, dtype), device, impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_prefix", [0, 1, 37])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_gradient(size, n_prefix, dtype, device, grad_impl):
    counts = [1, 63, 5, 70]
    check_backward(inputs(counts, counts, n_prefix, 4, 2, size, dtype), device, grad_impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_prefix", [0, 37])
def test_only_the_last_rows_are_queried(n_prefix, dtype, device, impl):
    check(inputs(*TRIMMED, n_prefix, 9, 3, 64, dtype), device, impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_prefix", [0, 37])
def test_gradient_where_only_the_last_rows_are_queried(n_prefix, dtype, device, grad_impl):
    check_backward(inputs(*TRIMMED, n_prefix, 9, 3, 64, dtype), device, grad_impl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 8, 1000])
def test_sliding_window(window, dtype, device, impl):
    arguments = inputs([20, 5, 90], [40, 5, 90], 7, 2, 2, 64, dtype)
    check(arguments, device, impl, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [3, 8, 1000])  # with 1 the gradients of q and k are zero
def test_gradient_with_a_sliding_window(window, dtype, device, grad_impl):
    arguments = inputs([20, 5, 90], [40, 5, 90], 7, 2, 2, 64, dtype)
    check_backward(arguments, device, grad_impl, window=window)


MASKED = {
    "bidirectional": {"mask": "bidirectional"},
    # Blocks at the front, in the middle, at the end, of one token, and none at all.
    "gem": {
        "mask": "gem",
        "blocks": torch.tensor([[0, 1], [20, 25], [0, 3], [60, 70], [9, 9]]).int(),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_prefix", [0, 1, 37])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("mask", MASKED)
def test_other_masks(mask, size, n_prefix, dtype, device, grad_impl):
    if grad_impl == "sdpa":
        pytest.skip("is causal")
    counts = [1, 40, 5, 70, 12]
    check(inputs(counts, counts, n_prefix, 4, 2, size, dtype), device, grad_impl, **MASKED[mask])
    few = inputs([1, 7, 5, 0, 12], counts, n_prefix, 4, 2, size, dtype)
    check_backward(few, device, grad_impl, **MASKED[mask])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("options", [{}, {"window": 200}, *MASKED.values()], ids=str)
def test_many_tiles(options, size, dtype):
    """Loops without a mask and filled pipelines, which a GPU has beyond some hundred keys.

    Too much for the interpreter.
    """
    arguments = inputs([1, 700, 5, 130, 333], [9, 700, 5, 410, 333], 300, 6, 2, size, dtype)
    check(arguments, "cuda", "triton", **options)
    check_backward(arguments, "cuda", "triton", **options)


def test_the_gem_mask_hides_what_it_should():
    """prefix · specials · suffix, by changing what must not matter."""
    q, k, v, starts, _, *prefix = inputs([12], [12], 4, 2, 1, 64, torch.float64)
    options = {"mask": "gem", "blocks": torch.tensor([[5, 7]]).int(), "impl": "reference"}
    before = attention(q, k, v, starts, starts, *prefix, **options)
    k[:5], v[:5] = 0, 0  # the text before the block
    prefix[0][:] = 0
    after = attention(q, k, v, starts, starts, *prefix, **options)
    torch.testing.assert_close(after[7:], before[7:])
    assert not torch.isclose(after[5:7], before[5:7]).any(-1).all()
    k[5] = 9  # a special token: its neighbour in the block does not see it, the suffix does
    changed = attention(q, k, v, starts, starts, *prefix, **options)
    torch.testing.assert_close(changed[6], after[6])
    assert not torch.allclose(changed[7:], after[7:])


def test_masks_that_make_no_sense_are_refused():
    arguments = inputs([3], [3], 0, 2, 1, 64, torch.float32)
    blocks = torch.tensor([[0, 1]]).int()
    for options, message in (
        ({"mask": "diagonal"}, "causal, bidirectional, gem, not 'diagonal'"),
        ({"mask": "bidirectional", "window": 3}, "sliding window"),
        ({"mask": "gem"}, "goes with the gem mask"),
        ({"mask": "bidirectional", "blocks": blocks}, "goes with the gem mask"),
    ):
        with pytest.raises(gen_fast.OpError, match=message):
            attention(*arguments, **options)
    q, k, v, starts, *_ = arguments
    for changed, message in (
        ((q[:, :, :8], k, v, starts, starts), "do not fit"),
        ((torch.cat((q, q[:, :1]), 1), torch.cat((k, k), 1), v, starts, starts), "do not fit"),
        ((q, k.bfloat16(), v, starts, starts), "one dtype"),
        ((q, k, v, starts.long(), starts), "int32"),
        ((q, k, v, torch.stack((starts, starts), 1)[:, 0], starts), "contiguous"),
        ((q, k, v, starts, starts, k), "as many keys as values"),
        ((q, k, v, starts, starts, k.bfloat16(), v.bfloat16()), "does not go before"),
        ((q, k, v, starts, starts, None, None, 0), "at least 1 token"),
        ((q, k, v, starts, starts, None, None, None, "gem", blocks.long()), "of int32"),
    ):
        with pytest.raises(gen_fast.OpError, match=message):
            attention(*changed)
    with pytest.raises(gen_fast.ImplementationError, match="does not compute 'bidirectional'"):
        attention(*arguments, mask="bidirectional", impl="sdpa")


def test_no_texts_and_no_rows(device, impl):
    none = [moved(x, device) for x in inputs([], [], 0, 4, 2, 64, torch.float32)]
    assert attention(*none, impl=impl).shape == (0, 4, 64)
    check(inputs([0, 2, 0], [0, 2, 0], 3, 4, 2, 64, torch.float32), device, impl)


@pytest.mark.parametrize("n_prefix", [0, 5])
@pytest.mark.parametrize("padding", [1, 70])
def test_padding_rows_give_zeros(padding, n_prefix, device, grad_impl):
    """Rows of no text, behind the last: what multiplies whole tiles reads their results."""
    counts = [1, 40, 7]
    arguments = inputs([*counts, padding], [*counts, padding], n_prefix, 4, 2, 64, torch.float32)
    q, k, v, starts, _, *prefix = (moved(x, device) for x in arguments)
    starts, rows = starts[:-1].contiguous(), sum(counts)
    rest = (starts, starts, *prefix, *CAUSAL)
    out, lse = OP.torch_op(q, k, v, *rest, impl=grad_impl)
    alone, alone_lse = OP.torch_op(q[:rows], k[:rows], v[:rows], *rest, impl=grad_impl)
    torch.testing.assert_close(out[:rows], alone)
    torch.testing.assert_close(lse[:rows], alone_lse)
    assert not out[rows:].any()
    assert not lse[rows:].any()
    grads = BACKWARD.torch_op(torch.ones_like(out), q, k, v, out, lse, *rest, impl=grad_impl)
    for grad in grads:
        assert grad[:rows].isfinite().all()
        assert not grad[rows:].any()


def test_no_texts_but_padding(device, grad_impl):
    q, k, v = (torch.ones(5, 2, 16, device=device) for _ in range(3))
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    rest = (starts, starts, None, None, *CAUSAL)
    out, lse = OP.torch_op(q, k, v, *rest, impl=grad_impl)
    for result in (out, lse, *BACKWARD.torch_op(q, q, k, v, out, lse, *rest, impl=grad_impl)):
        assert not result.any()


def test_large_scores_stay_finite(device, impl):
    arguments = [moved(x, device) for x in inputs([50], [50], 20, 2, 1, 64, torch.float32)]
    arguments[0] = arguments[0] * 100
    result = attention(*arguments, impl=impl)
    assert torch.isfinite(result).all()


def test_a_text_does_not_see_its_neighbours():
    q, k, v, starts, _ = inputs([30, 40], [30, 40], 0, 4, 2, 64, torch.float64)[:5]
    together = attention(q, k, v, starts, starts)
    alone = attention(q[30:], k[30:], v[30:], offsets([40]), offsets([40]))
    torch.testing.assert_close(together[30:], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 48, 63, 64, 80, 96, 256])
def test_every_instruction_set(isa_or_amx, size, dtype):
    counts = [1, 63, 64, 5, 130]
    for n_prefix in (0, 37):
        check(inputs(counts, counts, n_prefix, 6, 2, size, dtype), "cpu", "cpu")
        check_backward(inputs(counts, counts, n_prefix, 6, 2, size, dtype), "cpu", "cpu")
    # Odd counts of rows and keys; rows beyond the window within a block of keys.
    trimmed = inputs([10, 1, 0, 33, 69], [70, 1, 9, 33, 81], 5, 9, 3, size, dtype)
    check(trimmed, "cpu", "cpu", window=20)
    check_backward(trimmed, "cpu", "cpu", window=20)
    # Special tokens over several blocks of keys, of which their neighbours in the middle see none.
    blocks = torch.tensor([[20, 68], [0, 1], [3, 9], [33, 33], [2, 80]]).int()
    for options in ({"mask": "bidirectional"}, {"mask": "gem", "blocks": blocks}):
        check(trimmed, "cpu", "cpu", **options)
        check_backward(trimmed, "cpu", "cpu", **options)
    long = inputs([200], [200], 5, 6, 2, size, dtype)
    for options in ({}, {"window": 40}):
        options |= {"mask": "gem", "blocks": torch.tensor([[10, 190]]).int()}
        check(long, "cpu", "cpu", **options)
        check_backward(long, "cpu", "cpu", **options)


def forward_and_gradients(q, k, v, *rest, dropout=0.0):
    """The results and gradients of the C++ op, the last of ones."""
    rest = (*rest[:2], *(rest[2:] or (None, None)), None, "causal", None, dropout, 3, 0, None)
    out, lse = OP.torch_op(q, k, v, *rest, impl="cpu")
    dout = torch.ones_like(out)
    return out, lse, *BACKWARD.torch_op(dout, q, k, v, out, lse, *rest, impl="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [63, 64, 80])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_call_leaves_nothing_to_the_next(isa_or_amx, dropout, size, dtype):
    """Working memory is kept between calls: it may hold NaN where a call does not write."""

    def arguments(counts, number):
        n_prefix = 0 if dropout else 37
        made = inputs(counts, counts, n_prefix, 6, 2, size, dtype)
        return [x * number if x is not None and x.is_floating_point() else x for x in made]

    few = arguments([1, 5, 33, 70], 1)
    many = arguments([64, 1, 200, 3, 64], torch.nan)
    before = forward_and_gradients(*few, dropout=dropout)
    assert forward_and_gradients(*many, dropout=dropout)[0].isnan().all()
    after = forward_and_gradients(*few, dropout=dropout)
    for x, y in zip(before, after, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_text_stays_there(isa_or_amx, dtype):
    counts = [5, 9, 1, 6, 70, 40]
    q, k, v, *rest = inputs(counts, counts, 37, 6, 2, 63, dtype)
    clean = forward_and_gradients(q, k, v, *rest)
    bad = {1, 3, 4}
    for x in (q, k, v):
        texts = x.split(counts)
        for i in bad:
            texts[i].fill_(torch.nan)
    spoilt = forward_and_gradients(q, k, v, *rest)
    for x, y in zip(clean, spoilt, strict=True):
        for i, (one, other) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
            if i in bad:
                assert other.isnan().all()
            else:
                assert torch.equal(one, other)


def test_log_sum_exp(device, impl):
    """Saved for the backward pass, and what makes partial results mergeable."""
    arguments = [moved(x, device) for x in inputs(*TRIMMED, 37, 9, 3, 64, torch.float32)]
    _, actual = OP.torch_op(*arguments, *CAUSAL, impl=impl)
    expected = reference(*arguments[:3], AttentionOptions(*arguments[3:]))[1]
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (14, 2), (32, 1), (200, 1)])
def test_group_sizes(heads, kv_heads, device, impl):
    counts = [70, 3, 40] if heads < 200 else [5, 2]
    check(inputs(counts, counts, 9, heads, kv_heads, 64, torch.bfloat16), device, impl)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (14, 2), (200, 1)])
def test_gradient_of_group_sizes(heads, kv_heads, device, grad_impl):
    counts = [40, 3] if heads < 200 else [3, 1]
    arguments = inputs(counts, counts, 9, heads, kv_heads, 64, torch.float32)
    check_backward(arguments, device, grad_impl)


def test_one_options_object_serves_every_layer(device, impl):
    q, k, v, *settings = (moved(x, device) for x in inputs([5, 3], [9, 3], 4, 4, 2, 64, DTYPES[1]))
    # Strided, so that C++ points into copies, which the options keep alive.
    settings[2:] = [torch.stack((x, x), -1)[..., 0] for x in settings[2:]]
    options = AttentionOptions(*settings)
    for layer in (1.0, 2.0):
        actual = fast(q * layer, k, v, options, impl=impl)
        torch.testing.assert_close(actual, plain(q * layer, k, v, *settings))


# A dtype, a mask that hides some keys, and what is drawn.
DROPOUT = {
    "causal": (torch.float32, {"window": 9, "dropout": 0.3, "seed": 2**62 + 5, "layer": 31}),
    "bidirectional": (torch.bfloat16, {"mask": "bidirectional", "dropout": 0.7, "seed": 1}),
    "gem": (
        torch.float32,
        {
            "mask": "gem",
            "blocks": torch.tensor([[0, 1], [2, 40], [30, 33]]).int(),
            "dropout": 0.1,
            "text_keys": torch.tensor([-1, 2**31 - 1, 2**33 + 7]),
        },
    ),
}
# Texts of which all rows, the last and none are queried.
DROPPED = ([5, 3, 0], [5, 64, 33])


def kept_weights(q_counts, k_counts, heads, impl, device="cpu", **options):
    """Which weights [H, n, m] of each text are seen and kept, as the op's results show them.

    Scores are 0, and the values of text i's keys, at most as many as the head size, one-hot.
    """
    size = 64
    q, k, _, starts_q, starts_k, *_ = inputs(q_counts, k_counts, 0, heads, 2, size, DTYPES[1])
    values = torch.cat([torch.eye(size)[:count] for count in k_counts])
    v = values.unsqueeze(1).expand(k.shape).contiguous()
    options = {name: moved(x, device) for name, x in options.items()}
    settings = [moved(x, device) for x in (starts_q, starts_k)]
    out = attention(*(moved(x, device) for x in (0 * q, k, v)), *settings, impl=impl, **options)
    texts = zip(out.cpu().split(q_counts), k_counts, strict=True)
    return [(text[..., :count] != 0).transpose(0, 1) for text, count in texts]


def check_dropout(name, device, impl):
    """The weights that are kept, to the bit, and results and gradients of them."""
    dtype, options = DROPOUT[name]
    actual = kept_weights(*DROPPED, 4, impl, device, **options)
    keys = options.get("text_keys", torch.arange(3))
    blocks = options.get("blocks", torch.zeros(3, 2).int()).tolist()
    c2 = options.get("layer", 0) * HEADS + torch.arange(4).unsqueeze(1)
    for i, (n, m) in enumerate(zip(*DROPPED, strict=True)):
        place = torch.arange(m - n, m)
        keep = kept(options.get("seed", 0), options["dropout"], m, place, c2, keys[i])
        mask, window = options.get("mask", "causal"), options.get("window")
        seen = visible(n, m, 0, window, torch.device("cpu"), mask, blocks[i])
        assert torch.equal(actual[i], keep & seen)
    arguments = inputs(*DROPPED, 0, 4, 2, 64, dtype)
    check(arguments, device, impl, **options)
    check_backward(arguments, device, impl, **options)


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout(name, device, grad_impl):
    if grad_impl == "sdpa":
        pytest.skip("has no dropout")
    check_dropout(name, device, grad_impl)


def test_dropout_of_every_instruction_set(isa_or_amx):
    for name in DROPOUT:
        check_dropout(name, "cpu", "cpu")
    for dtype in DTYPES:  # several blocks of keys, chunks of rows, odd sizes
        arguments = inputs([1, 63, 64, 5, 230], [1, 70, 64, 9, 230], 0, 9, 3, 63, dtype)
        for options in ({}, {"mask": "bidirectional"}):
            check(arguments, "cpu", "cpu", **options, dropout=0.3, seed=7)
            check_backward(arguments, "cpu", "cpu", **options, dropout=0.3, seed=7)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"window": 200}, {"mask": "bidirectional"}], ids=str)
def test_dropout_of_many_tiles(options, size, dtype):
    arguments = inputs([1, 700, 5, 130, 333], [9, 700, 5, 410, 333], 0, 6, 2, size, dtype)
    check(arguments, "cuda", "triton", **options, dropout=0.3, seed=7)
    check_backward(arguments, "cuda", "triton", **options, dropout=0.3, seed=7)


def test_dropout_takes_the_words_of_the_generator(device, impl):
    """Counter and key 0: the first of the published known answers."""
    if impl == "sdpa":
        pytest.skip("has no dropout")
    for key, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        for p, is_kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            (one,) = kept_weights([4], [4], 2, impl, device, mask="bidirectional", dropout=p)
            assert one[0, 0, key] == is_kept


def test_gradient_of_dropout_in_float64():
    q, k, v, *starts = inputs([3, 1], [4, 5], 0, 4, 2, 3, torch.float64)[:5]
    options = AttentionOptions(*starts, mask="bidirectional", dropout=0.4, seed=3)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: fast(*x, options, impl="reference"), leaves)


def test_a_text_drops_the_same_weights_in_every_batch():
    options = {"mask": "bidirectional", "dropout": 0.3, "seed": 5, "layer": 2}
    keys = torch.tensor([8, 9, 7])
    batch = kept_weights([9, 64, 5], [9, 64, 5], 4, None, **options, text_keys=keys)
    (alone,) = kept_weights([64], [64], 4, None, **options, text_keys=torch.tensor([9]).int())
    last = kept_weights([2, 7], [5, 64], 4, None, **options, text_keys=keys[[2, 1]])
    assert torch.equal(batch[1], alone)
    assert torch.equal(batch[1][:, -7:], last[1])
    assert torch.equal(batch[2][:, -2:], last[0])


def test_seed_layer_text_and_head_each_change_what_is_dropped():
    options = {"mask": "bidirectional", "dropout": 0.5}
    weights = [
        kept_weights([64, 64], [64, 64], 2, None, **options, **other)
        for other in ({}, {"seed": 1}, {"seed": 2**32}, {"layer": 1})
    ]
    kept = torch.stack([head for run in weights for text in run for head in text]).flatten(1)
    agreeing = (kept.unsqueeze(0) == kept.unsqueeze(1)).double().mean(-1)
    sigma = 0.5 / kept.shape[1] ** 0.5
    assert ((agreeing - 0.5).abs() < 5 * sigma)[~torch.eye(len(kept), dtype=torch.bool)].all()
    assert ((kept.double().mean(1) - 0.5).abs() < 4 * sigma).all()


def test_options_of_a_layer():
    q, k, v, *starts = inputs([40, 5], [40, 5], 0, 4, 2, 64, torch.float32)[:5]
    settings = {"dropout": 0.3, "seed": 4}
    shared = AttentionOptions(*starts, **settings)
    fast(q, k, v, shared)  # C++ has been prepared for layer 0
    other = shared.with_layer(3)
    expected = AttentionOptions(*starts, **settings, layer=3)
    assert torch.equal(fast(q, k, v, other), fast(q, k, v, expected))
    assert not torch.equal(fast(q, k, v, other), fast(q, k, v, shared))
    plain_options = AttentionOptions(*starts, seed=4)
    assert plain_options.with_layer(3) is plain_options


def test_dropout_that_makes_no_sense_is_refused():
    q, k, v, starts, _, *prefix = inputs([3], [3], 2, 2, 1, 64, torch.float32)
    for options, message in (
        ({"dropout": 1.0}, "below 1"),
        ({"dropout": -0.1}, "at least 0"),
        ({"seed": -1}, "a seed of dropout"),
        ({"layer": 2**15}, "a layer is in"),
        ({"text_keys": torch.zeros(2).int()}, r"text_keys must be \[1\], not \[2\]"),
        ({"text_keys": torch.zeros(1)}, "text_keys must be int32 or int64"),
        ({"prefix_k": prefix[0], "prefix_v": prefix[1]}, "does not go with a prefix"),
    ):
        with pytest.raises(gen_fast.OpError, match=message):
            AttentionOptions(starts, starts, **{"dropout": 0.1} | options)
    options = AttentionOptions(starts, starts, dropout=0.1)
    with pytest.raises(gen_fast.OpError, match="does not go with a prefix"):
        options.with_prefix(*prefix)
    with pytest.raises(gen_fast.OpError, match="a layer is in"):
        options.with_layer(-1)
    with pytest.raises(gen_fast.ImplementationError, match="'causal with dropout'"):
        fast(q, k, v, options, impl="sdpa")


def test_opcheck():
    arguments = inputs([3, 2], [4, 2], 2, 4, 2, 8, torch.float32)
    q, k, v, *rest = arguments
    rest = (*rest, *CAUSAL)
    trained = [x.detach().requires_grad_() for x in (q, k, v)]
    opcheck(OP.torch_op, (*trained, *rest))
    out, lse = OP.torch_op(q, k, v, *rest)
    opcheck(BACKWARD.torch_op, (torch.randn_like(out), q, k, v, out, lse, *rest))
    dropped = (*rest[:2], None, None, None, "causal", None, 0.3, 7, 1, torch.tensor([4, 5]))
    opcheck(OP.torch_op, (*trained, *dropped))
