"""The backbone against transformers' own models."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from oracles import gem as gem_oracle

from gen_fast.errors import OpError
from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch, split_by_budget
from gen_fast.model.weights import load_backbone
from gen_fast.ops.attention.reference import visible
from gen_fast.ops.norm import rms_norm
from gen_fast.testing import FAMILY_OPTIONS, relative_error, save_tiny_model

LENGTHS = [1, 17, 2, 40, 17, 9]
TEXTS = [
    "Rain.",
    "A lighthouse marks dangerous coasts and safe entries to harbours; its keepers burned oil and "
    "trimmed the wicks every night, until electric light made them needless.",
    "The cat sat on the mat, and the dog lay by the door.",
]


def random_ids(vocab_size, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n) for n in lengths]


@pytest.fixture(scope="module", params=list(FAMILY_OPTIONS))
def family_models(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param.replace("/", "-"))
    return save_tiny_model(directory, request.param), load_backbone(directory)


def transformers_states(model, ids, *, bidirectional=False):
    """Hidden states before the final norm, one text at a time, no padding."""
    states = []
    keep = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: keep.append(args[0]))
    with torch.no_grad():
        for row in ids:
            # Of four dimensions: transformers takes a mask of ones for none, and is causal.
            mask = torch.zeros(1, 1, len(row), len(row)) if bidirectional else None
            tokens = torch.from_numpy(row).unsqueeze(0)
            model.model(input_ids=tokens, attention_mask=mask, use_cache=False)
            states.append(keep.pop()[0])
    hook.remove()
    return states


@pytest.mark.parametrize("needed", [None, [1, 10, 0, 3, 17, 9]])
def test_every_family_equals_transformers(family_models, needed):
    model, backbone = family_models
    ids = random_ids(backbone.config.vocab_size, LENGTHS)
    counts = needed or LENGTHS
    expected = torch.cat(
        [s[len(s) - n :] for s, n in zip(transformers_states(model, ids), counts, strict=True)]
    )
    actual = backbone.forward(PackedBatch.pack(ids, needed=needed))
    assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize("needed", [None, [1, 10, 0, 3, 17, 9]])
def test_every_family_without_a_causal_mask_equals_transformers(family_models, needed):
    model, backbone = family_models
    ids = random_ids(backbone.config.vocab_size, LENGTHS)
    counts = needed or LENGTHS
    states = transformers_states(model, ids, bidirectional=True)
    expected = torch.cat([s[len(s) - n :] for s, n in zip(states, counts, strict=True)])
    batch = PackedBatch.pack(ids, needed=needed)
    assert relative_error(backbone.forward(batch, mask="bidirectional"), expected) <= 1e-4


@pytest.mark.parametrize("mask", ["causal", "bidirectional"])
def test_the_first_state_hears_of_the_last_token_under_a_bidirectional_mask(tiny_model, mask):
    backbone = load_backbone(tiny_model)
    texts = [np.array([5, 6, 7]), np.array([5, 6, 8])]
    first, second = backbone.forward(PackedBatch.pack(texts), mask=mask)[[0, 3]]
    assert torch.equal(first, second) == (mask == "causal")


def test_a_prefix_or_a_cache_under_a_bidirectional_mask_is_refused(tiny_model):
    backbone = load_backbone(tiny_model)
    prefix = backbone.prefill((5, 6))
    batch = PackedBatch.pack([np.array([7, 8])], prefix_length=2)
    with pytest.raises(OpError, match="depend on the text behind it"):
        backbone.forward(batch, prefix=prefix, mask="bidirectional")
    with pytest.raises(OpError, match="depend on the text behind it"):
        backbone.forward(batch, cache=backbone.new_cache([2]), mask="bidirectional")


@pytest.mark.parametrize("n_prefix", [1, 12])
def test_every_family_behind_a_shared_prefix(family_models, n_prefix):
    model, backbone = family_models
    prefix_ids = random_ids(backbone.config.vocab_size, [20], seed=1)[0]
    own = random_ids(backbone.config.vocab_size, LENGTHS)
    joined = [np.concatenate((prefix_ids[:n_prefix], row)) for row in own]
    expected = torch.cat([s[n_prefix:] for s in transformers_states(model, joined)])
    # A cut of a longer prefix is as good as one computed at that length: attention is causal.
    prefix = backbone.prefill(tuple(prefix_ids.tolist())).cut(n_prefix)
    batch = PackedBatch.pack(own, prefix_length=n_prefix)
    assert relative_error(backbone.forward(batch, prefix=prefix), expected) <= 1e-4


def test_special_ids_take_rows_beyond_the_vocabulary(tiny_model):
    backbone = load_backbone(tiny_model)
    vocab = backbone.config.vocab_size
    copied = backbone.embedding[[5, 9]]
    with_specials = PackedBatch.pack([np.array([3, vocab, vocab + 1]), np.array([vocab + 1])])
    with_tokens = PackedBatch.pack([np.array([3, 5, 9]), np.array([9])])
    assert torch.equal(
        backbone.forward(with_specials, special=copied), backbone.forward(with_tokens)
    )


def test_training_keeps_no_query_before_its_rotation(tiny_model):
    backbone = load_backbone(tiny_model)
    config, saved = backbone.config, []
    special = torch.randn(7, config.hidden_size, requires_grad=True)
    batch = PackedBatch.pack([np.arange(config.vocab_size, config.vocab_size + 7)], needed=[7])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        backbone.forward(batch, special=special)
    assert saved
    fused = 7 * (config.q_size + 2 * config.kv_size) * special.element_size()
    assert fused not in {x.untyped_storage().nbytes() for x in saved}


def test_real_weights_equal_transformers(smollm2, smollm2_encoder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = random_ids(model.config.vocab_size, [3, 120, 33])
    expected = torch.cat(transformers_states(model, ids))
    actual = smollm2_encoder.backbone.forward(PackedBatch.pack(ids))
    assert relative_error(actual, expected) <= 1e-4
    # Without the causal mask, tokens drawn at random amplify rounding a hundred times: in float32
    # transformers itself is 8e-5 from float64. A text does not.
    ids = [np.array(row) for row in smollm2_encoder.tokenizer(TEXTS)["input_ids"]]
    expected = torch.cat(transformers_states(model, ids, bidirectional=True))
    actual = smollm2_encoder.backbone.forward(PackedBatch.pack(ids), mask="bidirectional")
    assert relative_error(actual, expected) <= 1e-4


def test_packing_positions_and_rows():
    batch = PackedBatch.pack([np.array([5, 6, 7]), np.array([8])], needed=[2, 0], prefix_length=4)
    assert batch.ids.tolist() == [5, 6, 7, 8]
    assert batch.positions.tolist() == [4, 5, 6, 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.needed.indices.tolist() == [1, 2]
    assert batch.needed.cu_seqlens.tolist() == [0, 2, 2]
    assert PackedBatch.pack([np.array([5]), np.array([8])], needed=[1, 1]).needed.indices is None
    with pytest.raises(ValueError, match="more needed rows"):
        PackedBatch.pack([np.array([5])], needed=[2])


def test_budget_cuts_between_texts_and_never_starves():
    assert list(split_by_budget([9, 3, 3, 4], 6)) == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert list(split_by_budget([], 6)) == []


def test_threads_that_grow_the_rotary_table_get_the_rows_they_need(tiny_model, monkeypatch):
    """A small table that is slow to build harms nobody."""
    backbone = load_backbone(tiny_model)
    build = Backbone._rotary_table
    started = threading.Event()

    def slow_if_small(self, needed):
        table = build(self, needed)
        if needed <= 512:
            started.set()
            time.sleep(0.2)  # meanwhile the other thread builds its own, or waits
        return table

    monkeypatch.setattr(Backbone, "_rotary_table", slow_if_small)

    def rows(needed):
        if needed > 512:
            started.wait()
        return backbone.rotary_rows(torch.tensor([needed - 1]), needed)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(rows, [4, 3000]))
    assert sorted(backbone._rotary) == [512, 4096]
    for needed, (cos, sin) in zip([4, 3000], results, strict=True):
        angles = (needed - 1) * backbone._inverse_frequencies
        torch.testing.assert_close(cos[0], angles.cos())
        torch.testing.assert_close(sin[0], angles.sin())


def test_many_threads_on_one_backbone_get_the_numbers_of_one(tiny_model):
    """Every thread needs another length, so tables are built while others are read."""
    backbone = load_backbone(tiny_model)
    lengths = [3, 700, 1400, 5, 2900, 900]

    def rows(needed):
        return backbone.rotary_rows(torch.arange(needed), needed)

    for _ in range(20):
        backbone._rotary.clear()
        with ThreadPoolExecutor(6) as pool:
            for needed, (cos, _) in zip(lengths, pool.map(rows, lengths), strict=True):
                assert len(cos) == needed
        assert sorted(backbone._rotary) == [512, 1024, 2048, 4096]


GEM = [((0, 0), 11), ((4, 5), 9), ((6, 9), 9), ((3, 7), 15), ((0, 2), 2), ((1, 4), 20)]


@pytest.mark.parametrize("block", [block for block, _ in GEM], ids=str)
def test_the_op_sees_what_the_rules_of_gem_say(block):
    length = dict(GEM)[block]
    own = visible(length, length, 0, None, torch.device("cpu"), "gem", block)
    assert torch.equal(own, gem_oracle.seen(length, block))
    # Behind a shared prefix the rules are those of the whole sequence, blocks in own positions.
    first, after = block
    if after == length and after > first:
        whole = gem_oracle.seen(length + 5, (first + 5, after + 5))
        shared = visible(length, length, 5, None, torch.device("cpu"), "gem", block)
        assert torch.equal(shared, whole[5:])


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_the_gem_mask_equals_transformers_with_a_dense_one(tmp_path, family):
    model = save_tiny_model(tmp_path, family)
    backbone = load_backbone(tmp_path)
    vocabulary = backbone.config.vocab_size
    torch.manual_seed(0)
    special = 0.1 * torch.randn(4, backbone.config.hidden_size)
    ids = random_ids(vocabulary, [length for _, length in GEM])
    for row, ((first, after), _) in zip(ids, GEM, strict=True):
        row[first:after] = vocabulary + np.arange(after - first)
    batch = PackedBatch.pack(ids, blocks=[block for block, _ in GEM])
    stream = backbone.forward(batch, special=special, mask="gem")
    actual = rms_norm(stream, backbone.final_norm, backbone.config.norm_eps)
    with torch.no_grad():
        expected = [
            gem_oracle.states(model, row, special, block)
            for row, (block, _) in zip(ids, GEM, strict=True)
        ]
    assert relative_error(actual, torch.cat(expected)) <= 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_a_prefix_a_trimmed_layer_and_a_cache_are_exact_under_the_gem_mask(tiny_model, packed):
    backbone = load_backbone(tiny_model, packed=packed)
    vocabulary, m = backbone.config.vocab_size, 3
    special = 0.1 * torch.randn(m, backbone.config.hidden_size)
    block = np.arange(vocabulary, vocabulary + m)
    prompt = np.array([5, 6, 7, 8])
    texts = [np.concatenate((ids, block)) for ids in random_ids(vocabulary, [4, 0, 9])]
    whole = [np.concatenate((prompt, ids)) for ids in texts]
    ends = [(len(ids) - m, len(ids)) for ids in whole]
    batch = PackedBatch.pack(whole, blocks=ends)
    states = backbone.forward(batch, special=special, mask="gem").split(list(map(len, whole)))
    needed = torch.cat([rows[-m:] for rows in states])
    trimmed = PackedBatch.pack(whole, needed=[m] * 3, blocks=ends)
    assert relative_error(backbone.forward(trimmed, special=special, mask="gem"), needed) <= 1e-5
    prefix = backbone.prefill(tuple(prompt.tolist()))
    behind = PackedBatch.pack(
        texts, needed=[m] * 3, prefix_length=4, blocks=[(a - 4, b - 4) for a, b in ends]
    )
    shared = backbone.forward(behind, special=special, prefix=prefix, mask="gem")
    assert relative_error(shared, needed) <= 1e-5
    # Tokens behind the block, one pass after another: they see the special tokens alone.
    more = random_ids(vocabulary, [5, 5, 5], seed=1)
    longer = [np.concatenate(pair) for pair in zip(whole, more, strict=True)]
    batch = PackedBatch.pack(longer, needed=[5] * 3, blocks=ends)
    expected = backbone.forward(batch, special=special, mask="gem").unflatten(0, (3, 5))
    cache = backbone.new_cache([len(ids) + 1 for ids in longer])
    steps = [whole, *([ids[i : i + 1] for ids in more] for i in range(5))]
    for i, rows in enumerate(steps):
        batch = PackedBatch.pack(rows, needed=[1] * 3, prefix_length=cache.held, blocks=ends)
        last = backbone.forward(batch, special=special, cache=cache, mask="gem")
        if i:
            assert relative_error(last, expected[:, i - 1]) <= 1e-5


def test_blocks_go_with_the_gem_mask_alone(tiny_model):
    backbone = load_backbone(tiny_model)
    text = [np.array([5, 6, 7])]
    with pytest.raises(OpError, match="mask is 'gem', no blocks were packed"):
        backbone.forward(PackedBatch.pack(text), mask="gem")
    with pytest.raises(OpError, match="mask is 'causal', blocks were packed"):
        backbone.forward(PackedBatch.pack(text, blocks=[(1, 2)]))
    with pytest.raises(ValueError, match="2 special blocks for 1 texts"):
        PackedBatch.pack(text, blocks=[(1, 2), (0, 0)])
