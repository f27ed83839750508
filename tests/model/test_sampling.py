"""The next token against transformers' own choice, and the settings of a generation_config.json."""

import json

import pytest
import torch

from gen_fast.model.sampling import Sampling, next_tokens, own_sampling, uniform_draws


@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.6, 1e-6])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_as_often_as_transformers_draws_them(temperature, top_p, top_k):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    expected = TopPLogitsWarper(top_p)(None, expected).softmax(-1)[0]
    # Every token has a share of the numbers from 0 to 1.
    uniform = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    sampling = Sampling(temperature, top_p, top_k)
    drawn = next_tokens(logits.expand(len(uniform), -1), sampling, uniform)
    shares = torch.bincount(drawn, minlength=40) / len(uniform)
    torch.testing.assert_close(shares, expected, atol=2e-5, rtol=0)


def test_the_likeliest_token_needs_no_number():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert next_tokens(logits, Sampling(), None).tolist() == [1, 0]


def test_numbers_belong_to_a_seed_a_text_and_a_number():
    first = uniform_draws(0, "a text", 0, 5)
    assert first.tolist() == uniform_draws(0, "a text", 0, 9)[:5].tolist()
    for other in ((1, "a text", 0), (0, "another", 0), (0, "a text", 1)):
        assert (uniform_draws(*other, 5) != first).all()
    assert 0 <= first.min() <= first.max() < 1


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_sampling_that_makes_no_sense(options):
    with pytest.raises(ValueError, match="temperature"):
        Sampling(**options)


@pytest.mark.parametrize(
    ("settings", "expected", "named"),
    [
        (None, Sampling(seed=4), []),
        ({"temperature": 0.6, "eos_token_id": 2}, Sampling(seed=4), []),
        ({"do_sample": True}, Sampling(1.0, 1.0, 50, 4), []),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
            Sampling(0.6, 0.95, 20, 4),
            [],
        ),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, Sampling(1.0, 1.0, 0, 4), ["min_p = 0.1"]),
        (
            {"repetition_penalty": 1.1, "num_beams": 4, "min_p": 0.1},
            Sampling(seed=4),
            ["num_beams = 4", "repetition_penalty = 1.1"],
        ),
    ],
)
def test_the_model_s_own_settings(tmp_path, caplog, settings, expected, named):
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert own_sampling(tmp_path, seed=4) == expected
    messages = [record.message for record in caplog.records]
    assert len(messages) == bool(named)
    assert all(", ".join(named) in message for message in messages)
