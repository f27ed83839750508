"""GEM that trains the weights themselves: whole runs, and the models that they leave."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from gem_models import save_gem
from tiny_runs import gem_configs, kill_past, losses, run_in_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import gen_fast
from gen_fast.cli import app
from gen_fast.embed.loading import load_generator
from gen_fast.formats.gem import read_special
from gen_fast.formats.peft import read_adapter
from gen_fast.model import shards
from gen_fast.model.fingerprint import differences
from gen_fast.model.lora import MODULES
from gen_fast.model.sampling import GREEDY
from gen_fast.model.tensor_files import find_tensors
from gen_fast.model.weights import read_fingerprint
from gen_fast.testing import relative_error, save_tiny_model
from gen_fast.training.contrastive import embed
from gen_fast.training.gem import GEMTask, train
from gen_fast.training.gem_config import GEMConfig
from gen_fast.training.trainer import Stepper

QUESTIONS = ["where do seals live", "what is the ice"]


# Of the run that others are compared with.
WHOLE = {"steps": 8, "base_weight": 0.5, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def make_config(tiny_model, tmp_path_factory):
    """Call with settings to get a configuration that trains the weights."""
    make = gem_configs(tmp_path_factory.mktemp("full"), tiny_model)
    return lambda out, **settings: make(out, full=True, **settings)


@pytest.fixture(scope="module")
def whole(make_config):
    """A run that nothing interrupted."""
    config = make_config("whole", **WHOLE)
    train(config, show_progress_bar=False)
    return config


def model_bytes(config):
    """Of all files of a model that decide a number."""
    folder = Path(config.out) / "adapter"
    listed = json.loads((folder / "checksums.json").read_text())["files"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "gem.json"} <= set(listed)
    return {name: (folder / name).read_bytes() for name in listed}


def test_killed_and_continued_gives_the_same_bytes(make_config, whole):
    killed = make_config("killed", **WHOLE)
    kill_past(3, train, killed)
    train(killed, show_progress_bar=False)
    assert model_bytes(killed) == model_bytes(whole)
    assert losses(killed) == losses(whole)


def test_two_ranks_give_what_one_gives(make_config, whole):
    two = make_config("two", **WHOLE)
    run_in_ranks(train, two)
    assert losses(two) == pytest.approx(losses(whole), rel=1e-5)
    own, other = (find_tensors(Path(config.out) / "adapter") for config in (whole, two))
    for name in own.names():
        assert relative_error(other.stored(name), own.stored(name)) <= 1e-4, name


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_a_trained_model_is_a_whole_one(tmp_path, family, monkeypatch):
    """In gen_fast and in transformers it is what it was in training."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 17)
    save_tiny_model(tmp_path / "base", family)
    config = gem_configs(tmp_path, tmp_path / "base")(full=True, learning_rate=1e-2)
    folder = train(config, show_progress_bar=False)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    card = (folder / "README.md").read_text()
    assert "GEM, 2 special tokens, reconstruct, all linear weights: 4 steps" in card

    task = GEMTask.load(config)
    task.restore(folder)
    rows = task._data.validation
    with torch.no_grad():
        expected = embed(task._trained, [task._view(ids, 0) for ids in rows], None)
    encoder = gen_fast.load(folder, dtype="float32", device="cpu")
    assert (encoder.method, encoder.dimension, encoder.max_length) == ("gem", 48, 24)
    texts = [encoder._tokenizer.decode(ids) for ids in rows]
    assert relative_error(torch.from_numpy(encoder.encode(texts)), expected) <= 1e-5
    assert all(answer.text for answer in gen_fast.Reader(encoder).read_texts(texts[:2]))

    base, own = find_tensors(tmp_path / "base"), find_tensors(folder)
    assert set(own.names()) == set(base.names())
    for name in own.names():
        is_trained = any(f".{module}.weight" in name for module in MODULES)
        assert torch.equal(own.stored(name), base.stored(name)) != is_trained, name
    changed = differences(read_fingerprint(tmp_path / "base"), read_fingerprint(folder))
    roles = [key for key in changed if key.endswith("_proj.weight")]
    assert len(roles) == 7
    assert set(changed) - set(roles) <= {"layers_sha256"}

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.from_numpy(rows[0].astype(np.int64))[None]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[-1][0]
        own_states = task._trained.states([rows[0]], [0], None)
    assert relative_error(own_states, states) <= 1e-5
    answers = load_generator(
        folder, device="cpu", dtype="float32", max_new_tokens=12, sampling=GREEDY
    ).answers(QUESTIONS)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        out = model.generate(
            input_ids=prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2
        )
        text = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        assert answer.text == text
    with pytest.raises(gen_fast.AdapterError, match="backbone= has no meaning"):
        gen_fast.load(folder, backbone=tmp_path / "base")


def test_weights_begin_as_an_adapter_is_merged_in_float32(make_config, tiny_model, tmp_path):
    """Also where passes are in bfloat16."""
    adapter = save_gem(tmp_path / "gem", tiny_model)
    task = GEMTask.load(make_config("-", backbone=str(adapter), dtype="bfloat16"))
    factors = read_adapter(adapter).weights
    files = find_tensors(tiny_model)
    for name, weight in task.linears.update.weights().items():
        assert torch.equal(weight, factors.merged(name, files.stored(f"{name}.weight"))), name


def test_steps_learn_in_bfloat16(make_config):
    settings = {"learning_rate": 1e-3, "batch_size": 52, "alpha_start_step": 0}
    stepper = Stepper(GEMTask.load(make_config("-", dtype="bfloat16", **settings)))
    curve = [
        stepper.step(stepper.task.examples(stepper.taken, stepper.world))["total"]
        for _ in range(10)
    ]
    assert curve[-1] < 0.9 * curve[0]  # of the same texts


def test_the_command_line_trains_all_weights(make_config, tmp_path):
    config = make_config("commanded", steps=1)
    path = tmp_path / "settings.yaml"
    left_out = ("texts", "out", "backbone", "full")
    values = {k: v for k, v in config.plain().items() if k not in left_out}
    path.write_text(yaml.safe_dump(values))
    command = ["train", config.texts[0], "--method", "gem", "--full", "--config", str(path), "-q"]
    result = CliRunner().invoke(app, [*command, "--model", config.backbone, "--out", config.out])
    assert result.exit_code == 0, result.output
    assert read_special(Path(config.out) / "adapter").special.shape == (2, 48)
    assert (Path(config.out) / "adapter" / "model.safetensors").is_file()
    # What a run leaves of its settings is taken as it is.
    kept = yaml.safe_load((Path(config.out) / "config.yaml").read_text())
    assert GEMConfig(**{**kept, "texts": tuple(kept["texts"]), "report_to": ()}) == config
    for method in ("llm2vec", "llm2vec-gen"):
        result = CliRunner().invoke(app, ["train", "x.txt", "--method", method, "--full"])
        assert f"--full means nothing with --method {method}" in result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 16}, "lora_rank means nothing with full"),
        ({"lora_alpha": 32.0}, "lora_alpha means nothing with full"),
        ({"lora_dropout": 0.0}, "lora_dropout means nothing with full"),
        ({"lora_start": "run/adapter"}, "lora_start means nothing with full"),
    ],
)
def test_settings_of_lora_are_refused(make_config, settings, message):
    with pytest.raises(gen_fast.ConfigError, match=message):
        make_config("-", **settings)


def test_learning_rates_where_none_are_given():
    full, factors = (GEMConfig(texts=("-",), out="-", full=full) for full in (True, False))
    assert (full.learning_rate, full.special_learning_rate) == (2e-5, 1e-4)
    assert (factors.learning_rate, factors.special_learning_rate) == (1e-4, None)
    assert (full.lora_rank, factors.lora_rank, factors.lora_dropout) == (None, 16, 0.0)


def test_weights_are_not_continued_as_factors(make_config, whole):
    factors = {"lora_rank": 16, "lora_alpha": 32.0, "lora_dropout": 0.0}
    with pytest.raises(gen_fast.CheckpointError, match="full = True, this run has False"):
        train(replace(whole, full=False, **factors), show_progress_bar=False)
