"""Decoding with rows that are refilled, against one whole pass a token for each sequence alone."""

import numpy as np
import pytest
import torch

from gen_fast.model.batch import PackedBatch
from gen_fast.model.decoding import Decoder, kv_bytes_per_token
from gen_fast.model.sampling import GREEDY, Sampling, next_tokens
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.ops.norm import rms_norm
from gen_fast.testing import save_tiny_model

NEW_TOKENS = 11
# Of 260 tokens: a text ends after some ten of them.
ENDS = range(0, 260, 10)
SAMPLED = Sampling(1.3, 0.95, 40)


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral-window"])
def network(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    save_tiny_model(directory, request.param)
    backbone = load_backbone(directory, packed=True)
    return backbone, load_head(directory, backbone)


def sequences_of_mixed_length(count=11):
    rng = np.random.default_rng(3)
    return [rng.integers(3, 250, n) for n in rng.integers(1, 40, count)]


def options_of(kind, backbone, count):
    """Options of `decode`, and the rows that stand before and behind each sequence."""
    torch.manual_seed(1)
    special = 0.05 * torch.randn(4, backbone.config.hidden_size)
    vocabulary = backbone.config.vocab_size
    if kind == "prefix":
        return {"prefix": backbone.prefill((4, 9, 77, 5, 6))}, (4, 9, 77, 5, 6), ()
    if kind == "special":
        return {"special": special}, (), range(vocabulary, vocabulary + 4)
    if kind == "gem":
        return {"special": special}, (), (*range(vocabulary, vocabulary + 4), 8)
    return {}, (), ()


def alone(backbone, head, ids, sampling, numbers, special, block):
    """The oracle: everything is run again for every token."""
    new = []
    while len(new) < NEW_TOKENS:
        row = np.concatenate((ids, np.array(new, dtype=np.int64)))
        batch = PackedBatch.pack(
            [row], needed=[1], blocks=None if block is None else np.array([block])
        )
        mask = "causal" if block is None else "gem"
        hidden = backbone.forward(batch, special=special, mask=mask)
        states = rms_norm(hidden, backbone.final_norm, backbone.config.norm_eps)
        drawn = torch.from_numpy(numbers[len(new) : len(new) + 1])
        token = int(next_tokens(states @ head.T, sampling, drawn))
        if token in ENDS:
            return new, "stop"
        new.append(token)
    return new, "length"


@torch.inference_mode()
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["plain", "prefix", "special", "gem"])
def test_refilled_rows_write_what_each_sequence_writes_alone(
    network, kind, sampling, stops_nobody, monkeypatch
):
    backbone, head = network
    own = sequences_of_mixed_length()
    options, before, behind = options_of(kind, backbone, len(own))
    rows = [np.concatenate((ids, behind)).astype(np.int64) for ids in own]
    blocks = None
    if kind == "gem":
        blocks = np.array([(len(ids), len(ids) + 4) for ids in own])
    uniform = np.random.default_rng(5).random((len(own), NEW_TOKENS))
    decoder = Decoder(backbone, head, list(ENDS))
    expected = [
        alone(
            backbone,
            head,
            np.concatenate((before, ids)).astype(np.int64),
            sampling,
            numbers,
            options.get("special"),
            None if blocks is None else blocks[i],
        )
        for i, (ids, numbers) in enumerate(zip(rows, uniform, strict=True))
    ]
    lengths = [len(ids) for ids, _ in expected]
    assert min(lengths) < NEW_TOKENS // 2
    assert max(lengths) == NEW_TOKENS
    for batch_size, use_graphs in ((1, False), (4, False), (64, False), (1, True), (5, True)):
        monkeypatch.setattr(backbone, "use_graphs", use_graphs)
        decoded = decoder.decode(
            rows, NEW_TOKENS, sampling, blocks=blocks, uniform=uniform, batch_size=batch_size,
            **options,
        )  # fmt: skip
        assert [(ids.tolist(), why) for ids, why in decoded] == expected


def test_keys_and_values_stay_within_their_memory(network, monkeypatch):
    backbone, head = network
    rows = sequences_of_mixed_length()
    decoder = Decoder(backbone, head, list(ENDS))
    made, new_cache = [], backbone.new_cache

    def watched(capacities, **options):
        made.append(sum(capacities))
        return new_cache(capacities, **options)

    monkeypatch.setattr(backbone, "new_cache", watched)
    whole = decoder.decode(rows, NEW_TOKENS)
    longest = max(map(len, rows)) + NEW_TOKENS - 1
    for tokens in (3 * longest, longest // 2):
        limit = tokens * kv_bytes_per_token(backbone)
        few = decoder.decode(rows, NEW_TOKENS, kv_bytes=limit)
        # A single sequence is run whatever it takes.
        assert made[-1] <= max(tokens, longest)
        for (a, _), (b, _) in zip(few, whole, strict=True):
            assert a.tolist() == b.tolist()
    assert made[-1] == longest
    cache = new_cache([longest])
    assert sum(x.nbytes for pair in cache.layers for x in pair) == longest * kv_bytes_per_token(
        backbone
    )


def test_nothing_to_continue(network):
    decoder = Decoder(*network, [1])
    assert decoder.decode([], 3) == []
    with pytest.raises(ValueError, match="max_new_tokens"):
        decoder.decode([np.array([5])], 0)
    with pytest.raises(ValueError, match="batch_size"):
        decoder.decode([np.array([5])], 3, batch_size=0)
