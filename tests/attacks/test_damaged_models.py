"""One bit of an adapter, a checkpoint or a converted model is flipped: refused, or healed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from damage import Tally, flipped
from gem_models import save_gem
from tiny_data import train_config, write_answers, write_teacher
from tiny_gguf import write_gguf

import gen_fast
from gen_fast.formats.llm2vec import Settings, write_settings
from gen_fast.formats.peft import write_adapter
from gen_fast.io.checksums import CHECKSUMS
from gen_fast.model.choices import QUANTIZED
from gen_fast.model.lora import Lora, LoraConfig
from gen_fast.model.sources import resolve
from gen_fast.model.weights import load_backbone
from gen_fast.testing import WHOLE_BLOCKS, save_tiny_adapter, save_tiny_model
from gen_fast.training.checkpoint import latest_checkpoint
from gen_fast.training.llm2vec_gen import train

TEXTS = ["the cat sat on the mat", "another"]
MANY = pytest.param(100, marks=pytest.mark.slow)


def attack(kind: str, path: Path, count: int, act: Callable[[], bytes]) -> Tally:
    """Flip bits of a file, and `act` after each: it gives what it gave before, or is refused."""
    expected = act()
    tally = flipped(
        f"{kind}, loaded", path, count, lambda: "healed" if act() == expected else "silent"
    )
    assert not tally.bugs, tally.bugs
    return tally


def embedded_by(model: Path) -> Callable[[], bytes]:
    """Load a model and embed two texts."""

    def act() -> bytes:
        vectors = gen_fast.load(model, device="cpu", dtype="float32").encode(TEXTS)
        return np.asarray(vectors).tobytes()

    return act


def save_llm2vec(directory: Path, model: Path) -> None:
    """Write an LLM2Vec model of one adapter over a tiny model."""
    backbone = load_backbone(model, bidirectional=True)
    lora = Lora(LoraConfig(rank=2), backbone.config, seed=0)
    write_adapter(directory, lora.weights(), base=str(model), fingerprint=backbone.fingerprint)
    write_settings(directory, Settings(max_length=64))


@pytest.mark.parametrize("count", [5, MANY])
@pytest.mark.parametrize("file", ["config.json", "adapter.safetensors", CHECKSUMS])
def test_of_an_adapter(tiny_model: Path, tmp_path: Path, file: str, count: int) -> None:
    save_tiny_adapter(tmp_path, tiny_model)
    tally = attack(f"adapter: {file}", tmp_path / file, count, embedded_by(tmp_path))
    assert tally.counts["refused"] == count


@pytest.mark.parametrize("count", [5, MANY])
@pytest.mark.parametrize(
    "file",
    ["adapter_config.json", "adapter_model.safetensors", "gen_fast.json", "llm2vec_config.json"],
)
def test_of_an_llm2vec_model(tiny_model: Path, tmp_path: Path, file: str, count: int) -> None:
    save_llm2vec(tmp_path, tiny_model)
    tally = attack(f"LLM2Vec adapter: {file}", tmp_path / file, count, embedded_by(tmp_path))
    assert tally.counts["refused"] == count


@pytest.mark.parametrize("count", [5, MANY])
@pytest.mark.parametrize("file", ["gem.json", "special.safetensors"])
def test_of_a_gem_model(tiny_model: Path, tmp_path: Path, file: str, count: int) -> None:
    save_gem(tmp_path, tiny_model)
    tally = attack(f"GEM adapter: {file}", tmp_path / file, count, embedded_by(tmp_path))
    assert tally.counts["refused"] == count


@pytest.mark.parametrize("count", [3, MANY])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", CHECKSUMS])
def test_of_a_gem_model_of_weights(tiny_model: Path, tmp_path: Path, file: str, count: int) -> None:
    save_gem(tmp_path, tiny_model, full=True)
    tally = attack(f"GEM model: {file}", tmp_path / file, count, embedded_by(tmp_path))
    assert tally.counts["refused"] == count


@pytest.mark.parametrize("count", [3, MANY])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "quantization.json", "config.json", "tokenizer.json", CHECKSUMS]
)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_of_a_quantised_copy(
    tmp_path: Path, kind: str, file: str, count: int, fp8_by_the_reference: None
) -> None:
    save_tiny_model(tmp_path / "model", "llama", **WHOLE_BLOCKS)
    copy = tmp_path / "copy"
    gen_fast.write_quantized(tmp_path / "model", copy, quantize=kind, device="cpu")
    tally = attack(f"{kind} copy: {file}", copy / file, count, embedded_by(copy))
    assert tally.counts["refused"] == count


@pytest.mark.parametrize("count", [3, MANY])
@pytest.mark.parametrize(
    "file",
    ["state.json", "optimizer.safetensors", "adapter/adapter.safetensors", CHECKSUMS],
)
def test_of_a_checkpoint(tiny_model: Path, tmp_path: Path, file: str, count: int) -> None:
    """The next step of the run is never another one."""
    write_answers(tmp_path / "answers.jsonl")
    write_teacher(tmp_path / "teacher.parquet", tmp_path / "answers.jsonl")
    begun = train_config(tmp_path, tiny_model, start="random", steps=1, out=str(tmp_path / "begun"))
    train(begun, show_progress_bar=False)
    damaged = latest_checkpoint(tmp_path / "begun" / "checkpoints")
    assert damaged is not None

    def act() -> bytes:
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "begun", out)
        folder = train(replace(begun, out=str(out), steps=2), show_progress_bar=False)
        return (folder / "adapter.safetensors").read_bytes()

    tally = attack(f"checkpoint: {file}", damaged / file, count, act)
    assert tally.counts["refused"] == count


@pytest.mark.parametrize("count", [5, MANY])
def test_of_a_prefix_cache(tiny_model: Path, tmp_path: Path, count: int) -> None:
    prompt = "in the " * 40
    encoder = gen_fast.load(tiny_model, device="cpu", dtype="float32")
    encoder.encode(TEXTS, prompt=prompt)
    encoder.prefixes.save(tmp_path / "prefixes")

    def act() -> bytes:
        fresh = gen_fast.load(tiny_model, device="cpu", dtype="float32")
        fresh.prefixes.load(tmp_path / "prefixes")
        return np.asarray(fresh.encode(TEXTS, prompt=prompt)).tobytes()

    attack("prefix cache", tmp_path / "prefixes", count, act)


@pytest.mark.parametrize("count", [3, MANY])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", CHECKSUMS])
def test_of_a_converted_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, count: int
) -> None:
    """It is made again, and embeds as before."""
    monkeypatch.setenv("GEN_FAST_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "tiny.gguf"
    write_gguf(source, save_tiny_model(tmp_path / "tiny", "llama"))
    tally = attack(f"converted model: {file}", resolve(source) / file, count, embedded_by(source))
    assert tally.counts["healed"] == count
