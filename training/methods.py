"""The methods that the trainer has recipes for."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gen_fast.errors import ConfigError
from gen_fast.training import gem, llm2vec, llm2vec_gen
from gen_fast.training.choices import GEM, LLM2VEC, TRAINED
from gen_fast.training.config import TrainConfig, read_config, read_settings
from gen_fast.training.gem_config import GEMConfig
from gen_fast.training.llm2vec_config import LLM2VecConfig

Run = Callable[[bool | None], Path]
"""Trains, with a progress bar, without, or on a terminal only (None); gives the adapter."""


def read_run(path: str | Path | None, overrides: Mapping[str, Any]) -> Run:
    """A run as a settings file and flags describe it.

    Beside the fields of the method's settings both may say `method`, of TRAINED; the first is the
    default. Raises ConfigError.
    """
    values = {**read_settings(path), **overrides}
    method = values.pop("method", TRAINED[0])
    if method not in TRAINED:
        raise ConfigError(f"method must be {' or '.join(TRAINED)}, not {method!r}")
    if method == LLM2VEC:
        settings = read_config(values, LLM2VecConfig)
        return lambda bar: llm2vec.train(settings, show_progress_bar=bar)
    if method == GEM:
        gem_settings = read_config(values, GEMConfig)
        return lambda bar: gem.train(gem_settings, show_progress_bar=bar)
    config = read_config(values, TrainConfig)
    return lambda bar: llm2vec_gen.train(config, show_progress_bar=bar)
