"""A model that was changed where it lies: jobs, adapters and training refuse it by name."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_corpus import options, write_corpus
from tiny_data import train_config, write_answers, write_teacher

import gen_fast
from gen_fast.errors import BackboneMismatchError, CheckpointError, JobError
from gen_fast.jobs.job import embed_corpus
from gen_fast.testing import FAMILY_OPTIONS, save_tiny_adapter, save_tiny_model
from gen_fast.training.config import TrainConfig
from gen_fast.training.llm2vec_gen import train

LAYER = "model.layers.1."
# What is changed, and the key that the refusal names.
TENSORS = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
    **{
        f"{LAYER}{name}.weight": f"layers.*.{name}.weight"
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")),
            *(f"self_attn.{part}" for part in ("q_norm", "k_norm")),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    },
}
SETTINGS = {
    "rms_norm_eps": (1e-4, "norm_eps"),
    "rope_theta": (5e4, "rope_theta"),
    "factor": (16.0, "rope_scaling"),
    "low_freq_factor": (2.0, "rope_scaling"),
    "high_freq_factor": (8.0, "rope_scaling"),
    "original_max_position_embeddings": (64, "rope_scaling"),
    "sliding_window": (4, "windows"),
}
SCALING = {**FAMILY_OPTIONS["llama3-rope"]["rope_scaling"], "rope_theta": 1e4}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and over it half a job, an adapter, and half a training run."""
    folder = tmp_path_factory.mktemp("work")
    model = folder / "model"
    save_tiny_model(model, "qwen3", rope_parameters=SCALING)
    save_tiny_adapter(folder / "adapter", model)
    corpus = write_corpus(folder / "corpus.jsonl", 40)
    embed_corpus(corpus, folder / "job", **options(model))
    (folder / "job" / "part-00001.parquet").unlink()
    write_answers(folder / "answers.jsonl")
    write_teacher(folder / "teacher.parquet", folder / "answers.jsonl")
    train(_config(folder, steps=1), show_progress_bar=False)
    return folder


def _config(folder: Path, steps: int) -> TrainConfig:
    model = folder / "model"
    return train_config(folder, model, start="random", steps=steps, checkpoint_every=1)


@pytest.fixture
def change(work: Path) -> Iterator[Callable[[str], str]]:
    """change(name): change a tensor or setting in place, and give the key that says so."""
    model = work / "model"
    kept = shutil.copytree(model, work / "kept")

    def change(name: str) -> str:
        if name in TENSORS:
            tensors = load_file(model / "model.safetensors")
            tensors[name].view(-1)[7] += 0.25
            save_file(tensors, model / "model.safetensors", {"format": "pt"})
            return TENSORS[name]
        value, key = SETTINGS[name]
        config = json.loads((model / "config.json").read_text())
        rope = config["rope_parameters"]
        (rope if name in rope else config)[name] = value
        if name == "sliding_window":
            config |= {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}
        (model / "config.json").write_text(json.dumps(config))
        return key

    yield change
    shutil.rmtree(model)
    kept.rename(model)


@pytest.mark.parametrize("name", [*TENSORS, *SETTINGS])
def test_a_change_is_refused_by_name(work: Path, change: Callable[[str], str], name: str) -> None:
    key = change(name)
    with pytest.raises(JobError, match=key.replace("*", r"\*")):
        embed_corpus(work / "corpus.jsonl", work / "job", **options(work / "model"))
    with pytest.raises(BackboneMismatchError, match=key.replace("*", r"\*")):
        gen_fast.load(work / "adapter", device="cpu")
    with pytest.raises(CheckpointError, match=key.replace("*", r"\*")):
        train(_config(work, steps=2), show_progress_bar=False)


def test_what_was_not_changed_goes_on(work: Path, tmp_path: Path) -> None:
    for name in ("job", "run"):
        shutil.copytree(work / name, tmp_path / name)
    embed_corpus(work / "corpus.jsonl", tmp_path / "job", **options(work / "model"))
    gen_fast.load(work / "adapter", device="cpu")
    train(replace(_config(work, steps=2), out=str(tmp_path / "run")), show_progress_bar=False)
