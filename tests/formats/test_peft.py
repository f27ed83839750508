"""LoRA adapters in PEFT's layout, against PEFT itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged_files import assert_damage_is_refused
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from gen_fast.errors import AdapterError, UnsupportedModelError
from gen_fast.formats.peft import read_adapter, write_adapter
from gen_fast.model.batch import PackedBatch
from gen_fast.model.lora import MODULES, Lora, LoraConfig
from gen_fast.model.weights import load_backbone
from gen_fast.ops.norm import rms_norm
from gen_fast.testing import relative_error, save_tiny_model

IDS = np.arange(3, 40)
LORA = LoraConfig(rank=4, alpha=6, dropout=0.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("peft") / "base"
    save_tiny_model(directory, "qwen2")
    return directory


def save_random_peft(base: Path, target: Path, kind=AutoModelForCausalLM, **options) -> None:
    """Write an adapter with random factors by PEFT's own code."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": list(MODULES), **options}
    model = get_peft_model(kind.from_pretrained(base), PeftConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(target)


def random_lora(base: Path, config: LoraConfig = LORA) -> Lora:
    lora = Lora(config, load_backbone(base).config)
    torch.manual_seed(2)
    with torch.no_grad():
        for b in lora.b:
            b.normal_()
    return lora


def peft_states(base: Path, adapter: Path, kind=AutoModelForCausalLM) -> torch.Tensor:
    model = PeftModel.from_pretrained(kind.from_pretrained(base), adapter).eval()
    decoder = model.base_model.model
    decoder = decoder.model if kind is AutoModelForCausalLM else decoder
    with torch.no_grad():
        return decoder(input_ids=torch.from_numpy(IDS)[None]).last_hidden_state[0]


def our_states(base: Path, adapter: Path) -> torch.Tensor:
    backbone, weights = load_backbone(base), read_adapter(adapter).weights
    lora = Lora.from_factors(weights.config, backbone.config, weights.factors)
    with torch.no_grad():
        stream = backbone.forward(PackedBatch.pack([IDS]), update=lora)
    return rms_norm(stream, backbone.final_norm, backbone.config.norm_eps)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "target_modules": ["v_proj"]}])
def test_pefts_adapters_are_read(base, tmp_path, kind, options):
    save_random_peft(base, tmp_path, kind, **options)
    adapter = read_adapter(tmp_path)
    assert (adapter.base, adapter.revision) == (str(base), None)
    expected = peft_states(base, tmp_path, kind)
    assert relative_error(our_states(base, tmp_path), expected) <= 1e-5


@pytest.mark.parametrize("causal_lm", [True, False])
@pytest.mark.parametrize("stabilized", [False, True])
def test_peft_reads_ours(base, tmp_path, causal_lm, stabilized):
    config = LoraConfig(
        rank=3, alpha=5.5, modules=("q_proj", "up_proj"), rank_stabilized=stabilized
    )
    lora = random_lora(base, config)
    write_adapter(tmp_path, lora.weights(), base=str(base), causal_lm=causal_lm, tags=("mntp",))
    kind = AutoModelForCausalLM if causal_lm else AutoModel
    expected = peft_states(base, tmp_path, kind)
    assert relative_error(our_states(base, tmp_path), expected) <= 1e-5


def test_what_is_written_is_read_bit_by_bit(base, tmp_path):
    weights = random_lora(base).weights()
    write_adapter(tmp_path, weights, base="owner/base", revision="v2", tags=("mntp",))
    again = read_adapter(tmp_path)
    assert (again.weights.config, again.base, again.revision) == (LORA, "owner/base", "v2")
    assert again.weights.factors.keys() == weights.factors.keys()
    for name, pair in weights.factors.items():
        assert all(map(torch.equal, pair, again.weights.factors[name])), name
    card = (tmp_path / "README.md").read_text()
    assert all(part in card for part in ("library_name: peft", "base_model: owner/base", "- mntp"))
    write_adapter(tmp_path / "again", again.weights, base="owner/base", revision="v2")
    first, second = (p.read_bytes() for p in sorted(tmp_path.rglob("adapter_model.safetensors")))
    assert first == second


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("written") / "adapter"
    save_random_peft(base, directory)
    return directory


@pytest.fixture
def adapter(written, tmp_path):
    """A private copy that a test may damage."""
    return shutil.copytree(written, tmp_path / "adapter")


@pytest.mark.parametrize(("key", "value"), [
    ("peft_type", "IA3"),
    ("bias", "lora_only"),
    ("use_dora", True),
    ("modules_to_save", ["embed_tokens"]),
    ("layers_to_transform", [0]),
    ("rank_pattern", {"q_proj": 2}),
    ("alpha_pattern", {"q_proj": 2}),
    ("fan_in_fan_out", True),
    ("lora_bias", True),
    ("exclude_modules", ["q_proj"]),
    ("target_modules", "all-linear"),
    ("target_modules", ".*_proj"),
    ("target_modules", ["q_proj", "lm_head"]),
    ("target_modules", []),
    ("target_parameters", ["mlp.experts"]),
    ("init_lora_weights", "pissa"),
    ("trainable_token_indices", [3]),
    ("layer_replication", [[0, 2]]),
    ("a_key_of_tomorrow", 3),
])  # fmt: skip
def test_what_is_not_computed_is_named(adapter, key, value):
    edit(adapter, **{key: value})
    with pytest.raises(UnsupportedModelError, match=key):
        read_adapter(adapter)


def edit(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_keys_of_tomorrow_that_ask_for_nothing(adapter):
    edit(adapter, a_key_of_tomorrow=None, another=False, more={})
    assert read_adapter(adapter).weights.config.rank == 4


NAME = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(NAME), "only one of the factors of 'layers.1.mlp.down_proj'"),
    (lambda t: t.update({NAME: torch.zeros(5, 80)}), "down_proj.* shape .5, 80.*rank 4"),
    (lambda t: t.update({NAME: t[NAME].int()}), "not all finite floats"),
    (lambda t: t.update({NAME: t[NAME] * float("nan")}), "not all finite floats"),
    (lambda t: t.update({"base_model.model.lm_head.weight": t[NAME].clone()}), "lm_head"),
    (lambda t: t.update({NAME.replace("lora_A", "magnitude"): t[NAME].clone()}), "magnitude"),
    (lambda t: t.clear(), "no factors"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(adapter, change, message):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=message):
        read_adapter(adapter)


def test_damaged_and_pickled_files(adapter):
    path = adapter / "adapter_model.safetensors"
    assert_damage_is_refused(path, lambda: read_adapter(adapter), AdapterError)
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="pickle"):
        read_adapter(adapter)
    edit(adapter, r=0)
    with pytest.raises(AdapterError, match="rank 0"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not JSON"):
        read_adapter(adapter)
