"""How the next token is chosen: the likeliest, or drawn; and what a model's own settings say."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_fast.errors import ConfigError, UnsupportedModelError
from gen_fast.model.model_files import read_json

logger = logging.getLogger(__name__)

# Logits divided by anything else are infinite, or all alike, in float32.
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 1e-4, 1e4
GENERATION_CONFIG = "generation_config.json"
# What transformers takes where a model samples and does not say (5.23, _get_default_generation_
# params): its top_k is 50, not off.
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
# What else of a generation_config.json changes the tokens, with the value that does not.
_NOT_COMPUTED: Mapping[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
}
# These only where tokens are drawn.
_NOT_DRAWN: Mapping[str, Any] = {
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest, or drawn if temperature > 0.

    top_k: draw among so many likeliest tokens; 0 takes all. top_p: draw among the likeliest of
    those whose probabilities reach it (nucleus sampling, arXiv 1904.09751). seed: of the draws.
    Raises ConfigError.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        in_range = _LEAST_TEMPERATURE <= self.temperature <= _MOST_TEMPERATURE
        if not (self.temperature == 0 or in_range) or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"temperature {self.temperature} must be 0 or from {_LEAST_TEMPERATURE} to "
                f"{_MOST_TEMPERATURE}, top_k {self.top_k} at least 0, top_p {self.top_p} in (0, 1]"
            )


GREEDY = Sampling()


def own_sampling(directory: str | Path, seed: int = 0) -> Sampling:
    """What the generation_config.json of a model says, with transformers' defaults.

    Greedy without one, or where it does not sample. What it asks for and is not computed, such as
    a repetition penalty, is named in a warning. Raises WeightsError for a damaged file,
    UnsupportedModelError for a value that is none of a sampling's.
    """
    path = Path(directory) / GENERATION_CONFIG
    settings = read_json(path) if path.is_file() else {}
    draws = bool(settings.get("do_sample"))
    neutral = {**_NOT_COMPUTED, **(_NOT_DRAWN if draws else {})}
    asked = {name: settings.get(name) for name in neutral}
    ignored = [f"{k} = {v}" for k, v in asked.items() if v not in (None, neutral[k])]
    if ignored:
        logger.warning("%s asks for %s, which is not computed", path, ", ".join(ignored))
    if not draws:
        return Sampling(seed=seed)
    own = {k: v if settings.get(k) is None else settings[k] for k, v in _DEFAULTS.items()}
    try:
        return Sampling(float(own["temperature"]), float(own["top_p"]), int(own["top_k"]), seed)
    except (ValueError, TypeError, OverflowError) as error:
        raise UnsupportedModelError(f"{path}: {error}") from error


def uniform_draws(seed: int, text: str, number: int, count: int) -> np.ndarray:
    """[count] numbers from [0, 1): of a text and a number, whatever else is drawn for."""
    key = hashlib.sha256(f"{seed} {number} {text}".encode()).digest()
    return np.random.default_rng(np.frombuffer(key, np.uint32)).random(count)


def next_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor | None) -> Tensor:
    """The token after each row of `logits` [B, V]: [B] int64. uniform [B]: needed for draws.

    A row's token depends on its own logits and number alone.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    assert uniform is not None, "draws need their random numbers"
    scaled = logits.float() / sampling.temperature
    order = None
    if sampling.top_k or sampling.top_p < 1:
        count = min(sampling.top_k or scaled.shape[1], scaled.shape[1])
        scaled, order = scaled.topk(count)  # likeliest first
    probabilities = scaled.softmax(-1)
    if sampling.top_p < 1:
        # A token stays if those before it do not reach top_p: the first one always does.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    # The first whose sum is above the number, which is never one of probability 0. In float64: sums
    # of 100,000 rounded probabilities.
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    threshold = uniform.to(sums).unsqueeze(1) * sums[:, -1:]
    drawn = torch.searchsorted(sums, threshold, right=True).clamp(max=sums.shape[1] - 1)
    return drawn.squeeze(1) if order is None else order.gather(1, drawn).squeeze(1)
