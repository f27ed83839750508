"""Model directories and files that are damaged: refused by name, or they load and embed."""

import json
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import gen_fast
from fuzzing import Damage, damages, few_or_many
from hypothesis import given, settings
from hypothesis import strategies as st

import gen_fast as package
from gen_fast.errors import GenFastError
from gen_fast.model.config import parse_config
from gen_fast.model.gguf import GGUFFile
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.testing import tiny_config

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# What a JSON file can hold, infinity, NaN and numbers without a size included.
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "llama", "x", "<unk>", "</s>", 0, 1, 48, 1e-5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("config.json", {"num_attention_heads": 0}, "num_attention_heads"),
        ("config.json", {"hidden_size": float("inf")}, "hidden_size"),
        ("config.json", {"rope_parameters": "default"}, "rope_parameters"),
        ("config.json", {"auto_map": 5}, "auto_map"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (TOKENIZER, {"added_tokens": [{"content": 5}]}, "tokenizer.json"),
        (TOKENIZER, {"pre_tokenizer": []}, "tokenizer.json"),
        (SETTINGS, {"eos_token": {}}, "eos_token"),
        (SETTINGS, {"auto_map": 5}, "auto_map"),
    ],
)
def test_a_damaged_file_is_named(
    model: Path, tmp_path: Path, name: str, changes: dict[str, Any], named: str
) -> None:
    edited(model / name, **changes)
    (tmp_path / "a.txt").write_text("one\n")
    outcome = gen_fast("encode", "a.txt", "--out", "o.npy", "--model", model, cwd=tmp_path)
    outcome.refused(named, code=4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token", 5),
        ("eos_token", {"content": None}),
        ("bos_token", ["<s>"]),
        ("additional_special_tokens", 5),
        ("additional_special_tokens", [5]),
        ("extra_special_tokens", {"image": 5}),
        ("added_tokens_decoder", []),
        ("added_tokens_decoder", {"1": 5}),
        ("added_tokens_decoder", {"1": {}}),
        ("tokenizer_class", ["LlamaTokenizer"]),
        ("auto_map", 5),
    ],
)
def test_settings_of_a_tokenizer_have_their_types(model: Path, key: str, value: object) -> None:
    edited(model / SETTINGS, **{key: value})
    with pytest.raises(package.WeightsError, match=rf"tokenizer_config\.json: {key} cannot be"):
        load_tokenizer(model)


def test_settings_of_a_tokenizer_are_no_pipe_and_no_lost_link(model: Path) -> None:
    path = model / SETTINGS
    path.unlink()
    load_tokenizer(model)  # they may be missing
    os.mkfifo(path)
    with pytest.raises(package.WeightsError, match="it is a pipe"):
        load_tokenizer(model)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(package.WeightsError, match="No such file"):
        load_tokenizer(model)


# ------------------------------------------------------------------------------ fuzzing

CONFIGS = {
    family: {k: v for k, v in tiny_config(family).to_dict().items() if v is not None}
    for family in ("llama", "llama3-rope", "mistral-window", "qwen2-window", "qwen3")
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """The config of a family with some of its values replaced, one level deep too."""
    config = json.loads(json.dumps(CONFIGS[draw(st.sampled_from(sorted(CONFIGS)))]))
    for _ in range(draw(st.integers(1, 3))):
        target = config
        rope = config.get("rope_parameters")
        if isinstance(rope, dict) and rope and draw(st.booleans()):
            target = rope
        extra = ["auto_map", "quantization_config", "layer_types", "rope_scaling", "head_dim"]
        target[draw(st.sampled_from(sorted({*target, *extra})))] = draw(VALUES)
    return config


@few_or_many
def test_a_config_of_any_values(examples: settings) -> None:
    @examples
    @given(config=configs())
    def check(config: dict[str, Any]) -> None:
        try:
            parsed = parse_config(config)
        except GenFastError:
            return
        assert parsed.num_layers == len(parsed.windows)
        assert min(parsed.num_heads, parsed.num_kv_heads, parsed.hidden_size, parsed.head_dim) > 0
        assert 0 < parsed.norm_eps < float("inf")
        assert 0 < parsed.rope_theta < float("inf")

    check()


def write_gguf(path: Path) -> None:
    """A small GGUF file, most of which is its header."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in (("token_embd", (4, 8)), ("output_norm", (8,)), ("blk.0.attn_q", (8, 8))):
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path)
    return path.read_bytes()


@few_or_many
def test_a_damaged_gguf_file(gguf_bytes: bytes, tmp_path: Path, examples: settings) -> None:
    path = tmp_path / "damaged.gguf"

    @examples
    @given(damage=damages())
    def check(damage: Damage) -> None:
        path.write_bytes(damage.done_to(gguf_bytes))
        with suppress(GenFastError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of values that overflow
            file = GGUFFile(path)
            config = file.config()
            for name in file.names():
                file.nbytes(name)
                file.tensor(name)
            json.dumps(config)

    check()


def tokenizers_with(changes: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    keys = ("eos_token", "bos_token", "tokenizer_class", "added_tokens_decoder", "auto_map")
    more = ("additional_special_tokens", "extra_special_tokens", "add_eos_token", "unk_token")
    return st.dictionaries(st.sampled_from((*keys, *more)), changes, min_size=1, max_size=3)


@few_or_many
def test_settings_of_a_tokenizer_of_any_values(model: Path, examples: settings) -> None:
    path = model / SETTINGS
    own = json.loads(path.read_text())

    @examples
    @given(changes=tokenizers_with(VALUES))
    def check(changes: dict[str, Any]) -> None:
        path.write_text(json.dumps({**own, **changes}))
        with suppress(GenFastError):
            assert len(load_tokenizer(model).ids("the cat", add_special_tokens=True))

    check()
