"""Values of a config.json: those of the wrong type or size are refused by their key."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import gen_fast
from gen_fast.model.config import BackboneConfig, parse_config
from gen_fast.testing import FAMILY_OPTIONS, tiny_config

LLAMA3 = {**FAMILY_OPTIONS["llama3-rope"]["rope_scaling"], "rope_theta": 1e4}


def parsed(family: str = "llama", **changes: Any) -> BackboneConfig:
    # As a file has it: infinity and NaN are what Python's json reads too.
    return parse_config(json.loads(json.dumps({**tiny_config(family).to_dict(), **changes})))


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", [0, -2, 2.5, "48", [48], {}, True, math.inf, 10**30])
def test_a_size_is_a_whole_number_above_0(key: str, value: object) -> None:
    with pytest.raises(gen_fast.UnsupportedModelError, match=key):
        parsed(**{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "partial_rotary_factor"])
@pytest.mark.parametrize("value", [0, -1e-5, "1e-5", [1], True, math.inf, math.nan, 10**400])
def test_a_number_is_finite_and_above_0(key: str, value: object) -> None:
    raw = {key: value}
    if key == "rope_theta":
        raw = {"rope_parameters": {"rope_theta": value}}
    with pytest.raises(gen_fast.UnsupportedModelError, match=key):
        parsed(**raw)


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", ["no", 0, [], 1.0])
def test_a_flag_is_true_or_false(key: str, value: object) -> None:
    with pytest.raises(gen_fast.UnsupportedModelError, match=key):
        parsed(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", "default"),
        ("rope_parameters", [1]),
        ("rope_scaling", 3),
        ("auto_map", 5),
        ("auto_map", "own.Code"),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [5]),
        ("quantization_config", "awq"),
        ("layer_types", 5),
        ("layer_types", [["full_attention"], 2, 3]),
        ("sliding_window", "wide"),
        ("sliding_window", 0),
        ("sliding_window", -8),
        ("model_type", ["llama"]),
        ("hidden_act", ["silu"]),
        ("num_hidden_layers", 10**9),  # which would be counted up to
    ],
)
def test_other_values_have_their_types(key: str, value: object) -> None:
    with pytest.raises(gen_fast.UnsupportedModelError, match=key):
        parsed(**{"rope_parameters": None, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("factor", 0), ("low_freq_factor", "x"), ("high_freq_factor", 1), ("factor", None)]
    + [("original_max_position_embeddings", value) for value in (0, 8.5, "x")],
)
def test_scaling_of_long_context_is_checked(key: str, value: object) -> None:
    with pytest.raises(gen_fast.UnsupportedModelError, match=key):
        parsed(rope_parameters={**LLAMA3, key: value})


def test_an_integer_is_a_number() -> None:
    config = parsed(rms_norm_eps=1, rope_parameters={"rope_theta": 10_000})
    assert (config.norm_eps, config.rope_theta) == (1.0, 10_000.0)
    assert parsed(rope_parameters={**LLAMA3, "factor": 8}).rope_scaling is not None


def test_null_is_what_a_key_says_that_is_missing() -> None:
    changes = dict.fromkeys(("head_dim", "num_key_value_heads", "rope_parameters", "auto_map"))
    config = parsed(**changes)
    assert (config.head_dim, config.num_kv_heads, config.rope_theta) == (8, 6, 10_000.0)


def test_a_class_of_the_wrong_type_is_refused_where_models_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": 5}))
    with pytest.raises(gen_fast.UnsupportedModelError, match="auto_map"):
        gen_fast.load(tmp_path)
