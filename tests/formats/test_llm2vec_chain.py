"""LLM2Vec checkpoints: what lies below an adapter, and everything that can be wrong with that."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import gen_fast
from gen_fast.embed.loading import identify
from gen_fast.formats.llm2vec import (
    Settings,
    read_checkpoint,
    read_settings,
    wrapper_of,
    write_settings,
)
from gen_fast.formats.peft import read_adapter, write_adapter
from gen_fast.model.batch import PackedBatch
from gen_fast.model.lora import Lora, LoraConfig
from gen_fast.model.weights import load_backbone, read_fingerprint
from gen_fast.ops.norm import rms_norm
from gen_fast.testing import edit_config, forget_checksums, save_tiny_model

TEXTS = ["the cat in a hat", "another"]


def save_adapter(directory: Path, backbone: Path, base: str, *, seed: int = 0, **options) -> None:
    """A random adapter for a tiny backbone, whose record names `base`."""
    lora = Lora(LoraConfig(rank=2), load_backbone(backbone).config, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for b in lora.b:
            b.normal_(std=0.1)
    write_adapter(directory, lora.weights(), base=base, causal_lm=False, **options)
    if not options:
        (directory / "gen_fast.json").unlink()  # as PEFT leaves it
        forget_checksums(directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """base, base-mntp (with the base's config) and base-mntp-supervised, side by side."""
    folder = tmp_path_factory.mktemp("chain")
    save_tiny_model(folder / "base", "llama")
    save_adapter(folder / "base-mntp", folder / "base", "owner/base", seed=1)
    shutil.copy(folder / "base" / "config.json", folder / "base-mntp")
    edit_config(
        folder / "base-mntp",
        architectures=["LlamaEncoderModel"],
        auto_map={"AutoModel": "modeling_llama_encoder.LlamaEncoderModel"},
        _name_or_path="owner/base",
    )
    save_adapter(folder / "base-mntp-supervised", folder / "base", "owner/base", seed=2)
    write_settings(folder / "base-mntp-supervised", Settings(max_length=64))
    return folder


@pytest.fixture
def chain(made, tmp_path) -> Path:
    """A private copy that a test may change."""
    return shutil.copytree(made, tmp_path / "chain")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """The Hub has none of these."""

    def download(repository, revision, **options):
        raise gen_fast.ModelNotFoundError(f"cannot get {repository} from the Hub")

    monkeypatch.setattr("gen_fast.model.hub.download", download)


def adapters(directory: Path, **options) -> int:
    return len(read_checkpoint(directory, str(directory), **options).adapters)


def test_neighbours_of_the_recorded_names_are_found(chain):
    checkpoint = read_checkpoint(chain / "base-mntp-supervised", "base-mntp-supervised")
    assert len(checkpoint.adapters) == 2
    assert checkpoint.source == chain / "base"
    assert checkpoint.settings == Settings(max_length=64)
    assert adapters(chain / "base-mntp") == 1
    # Merged in the order in which they were trained.
    first, second = (a.factors["layers.0.mlp.down_proj"][1] for a in checkpoint.adapters)
    torch.manual_seed(1)
    assert first.std() > 0
    assert not torch.equal(first, second)
    mntp = read_checkpoint(chain / "base-mntp", "base-mntp").adapters[0]
    assert torch.equal(first, mntp.factors["layers.0.mlp.down_proj"][1])


def test_backbone_says_where_the_base_lies(chain, tmp_path):
    base = shutil.move(chain / "base", tmp_path / "elsewhere")
    outermost = chain / "base-mntp-supervised"
    checkpoint = read_checkpoint(outermost, str(outermost), base)
    assert (len(checkpoint.adapters), checkpoint.source) == (2, base)
    encoder = gen_fast.load(outermost, backbone=base, dtype="float32", device="cpu")
    assert np.isfinite(encoder.encode(TEXTS)).all()
    with pytest.raises(gen_fast.ModelNotFoundError, match=r"-mntp was trained over .*owner/base"):
        read_checkpoint(outermost, str(outermost))


def test_a_missing_link_is_named(chain):
    shutil.rmtree(chain / "base-mntp")
    outermost = chain / "base-mntp-supervised"
    for backbone in (None, chain / "base"):  # the base alone would give other embeddings
        with pytest.raises(
            gen_fast.ModelNotFoundError, match=r"the MNTP adapter 'base-mntp'.*backbone="
        ):
            gen_fast.load(outermost, backbone=backbone)
    edit_adapter(outermost, base_model_name_or_path="owner/x-mntp")
    with pytest.raises(gen_fast.ModelNotFoundError, match="the MNTP adapter 'owner/x-mntp'"):
        gen_fast.load(outermost, backbone=chain / "base")
    edit_adapter(chain / "base-mntp-supervised", base_model_name_or_path=None)
    renamed = outermost.rename(chain / "mine")
    with pytest.raises(gen_fast.ModelNotFoundError, match="does not name the model"):
        gen_fast.load(renamed)


def edit_adapter(directory: Path, **changes) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    forget_checksums(directory)


def test_a_record_may_name_the_adapter_below(chain):
    renamed = (chain / "base-mntp-supervised").rename(chain / "mine")
    below = (chain / "base-mntp").rename(chain / "first")
    for name in ("first", "../first", str(below), "owner/first"):
        edit_adapter(renamed, base_model_name_or_path=name)
        assert adapters(renamed) == 2
    edit_adapter(below, base_model_name_or_path=str(renamed))
    with pytest.raises(gen_fast.AdapterError, match="put on itself"):
        adapters(renamed)


def test_what_no_file_says_is_asked_for(chain, caplog):
    """LLM2Vec.save writes the same over a base and over an MNTP adapter that it has merged."""
    renamed = (chain / "base-mntp-supervised").rename(chain / "mine")
    with pytest.raises(gen_fast.ModelNotFoundError, match="no file says whether an MNTP adapter"):
        adapters(renamed)
    assert adapters(renamed, backbone=chain / "base-mntp") == 2
    assert not caplog.records
    assert adapters(renamed, backbone=chain / "base") == 1
    assert "if it was trained over an MNTP adapter" in caplog.text


def test_ours_say_which_weights_they_were_trained_over(chain):
    base, ours = chain / "base", chain / "ours"
    save_adapter(ours, base, str(base), fingerprint=read_fingerprint(base))
    write_settings(ours, Settings())
    assert adapters(ours) == 1
    below = read_checkpoint(chain / "base-mntp", "").adapters
    over = read_fingerprint(base, adapters=below)
    save_adapter(ours, base, str(chain / "base-mntp"), fingerprint=over)
    assert adapters(ours) == 2
    (ours / "gen_fast.json").write_text('{"format": "gen_fast.lora/1", "backbone": {}}')
    with pytest.raises(gen_fast.AdapterError, match=r"gen_fast.json is damaged or was changed"):
        adapters(ours)
    forget_checksums(ours)
    assert adapters(ours) == 2
    edit_adapter(ours, base_model_name_or_path=str(base))
    assert adapters(ours) == 1
    save_adapter(ours, base, str(base), fingerprint=over)
    with pytest.raises(gen_fast.BackboneMismatchError, match="adapters_sha256"):
        adapters(ours)


def test_an_adapter_of_another_base_is_named(chain):
    save_tiny_model(chain / "other", "llama", num_hidden_layers=2)
    with pytest.raises(gen_fast.BackboneMismatchError, match=r"config.json has num_layers 3"):
        adapters(chain / "base-mntp", backbone=chain / "other")
    (chain / "base-mntp" / "config.json").unlink()
    with pytest.raises(gen_fast.BackboneMismatchError, match=r"updates 'layers.2"):
        gen_fast.load(chain / "base-mntp", method="llm2vec", backbone=chain / "other")


def test_how_adapters_are_known(chain, tiny_model):
    plain = chain / "plain"
    save_adapter(plain, chain / "base", str(chain / "base"))
    with pytest.raises(gen_fast.UnsupportedModelError, match=r"LoRA adapter.* must be given"):
        gen_fast.load(plain)
    with pytest.raises(gen_fast.UnsupportedModelError, match=r"not 'sentence-transformers'"):
        gen_fast.load(plain, method="sentence-transformers")
    causal = gen_fast.load(plain, method="mean", dtype="float32", device="cpu")
    assert causal.method == "mean"
    merged = load_backbone(chain / "base", adapters=[read_adapter(plain).weights])
    states = merged.forward(PackedBatch.pack([np.array(causal.tokenizer("a cat")["input_ids"])]))
    means = rms_norm(states, merged.final_norm, merged.config.norm_eps).mean(0).numpy()
    np.testing.assert_allclose(causal.encode("a cat"), means, rtol=1e-4, atol=1e-5)
    assert identify(plain, method="llm2vec")["method"] == "llm2vec"
    assert identify(chain / "base-mntp-supervised")["method"] == "llm2vec"
    assert identify(chain / "base-mntp")["method"] == "llm2vec"
    with pytest.raises(gen_fast.UnsupportedModelError, match=r"causal mask.* not 'mean'"):
        gen_fast.load(chain / "base-mntp", method="mean")
    with pytest.raises(gen_fast.AdapterError, match="holds no adapter"):
        gen_fast.load(tiny_model, method="llm2vec", backbone=tiny_model)
    edit_adapter(plain, use_dora=True)
    with pytest.raises(gen_fast.UnsupportedModelError, match="use_dora"):
        gen_fast.load(plain, method="llm2vec")


def test_own_code_is_only_let_be_where_it_is_llm2vecs(chain):
    edit_config(chain / "base-mntp", auto_map={"AutoModel": "modeling_other.OtherModel"})
    with pytest.raises(gen_fast.UnsupportedModelError, match="auto_map"):
        gen_fast.load(chain / "base-mntp", method="llm2vec")
    edit_config(chain / "base", is_causal=False)
    with pytest.raises(gen_fast.UnsupportedModelError, match="only method 'llm2vec' computes"):
        gen_fast.load(chain / "base")
    assert identify(chain / "base", method="llm2vec")["dimension"] == 48


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"pooling_mode": "bos_token"}, gen_fast.UnsupportedModelError, "pooling_mode 'bos_token'"),
    ({"latent": 3}, gen_fast.UnsupportedModelError, "latent 3"),
    ({"max_length": 0}, gen_fast.AdapterError, "max_length 0"),
    ({"doc_max_length": "400"}, gen_fast.AdapterError, "doc_max_length '400'"),
    ({"skip_instruction": 1}, gen_fast.AdapterError, "skip_instruction 1"),
])  # fmt: skip
def test_settings_that_have_no_meaning_are_named(tmp_path, changes, error, message):
    (tmp_path / "llm2vec_config.json").write_text(json.dumps(changes))
    with pytest.raises(error, match=message):
        read_settings(tmp_path)


def test_end_tokens():
    assert wrapper_of("meta-llama/Meta-Llama-3-8B", "llama", "eos_token").after == "<|end_of_text|>"
    assert wrapper_of("Qwen/Qwen2-7B", "qwen2", "eos_token").after == "<|endoftext|>"
    with pytest.raises(gen_fast.UnsupportedModelError, match=r"eos_token.*qwen3"):
        wrapper_of("", "qwen3", "eos_token")


def test_published_names_are_fetched_from_the_hub(chain, monkeypatch):
    """Each lies in a folder of its own, named by a commit."""
    asked = []

    def download(repository, revision, **options):
        asked.append((repository, revision))
        directory = chain / repository.rpartition("/")[2]
        snapshot = chain / "hub" / repository / "c0ffee"
        return snapshot if snapshot.exists() else shutil.copytree(directory, snapshot)

    monkeypatch.setattr("gen_fast.model.hub.download", download)
    edit_adapter(chain / "base-mntp", revision="v1")
    encoder = gen_fast.load("McGill-NLP/base-mntp-supervised", revision="v2")
    assert asked == [
        ("McGill-NLP/base-mntp-supervised", "v2"),
        ("McGill-NLP/base-mntp", None),
        ("owner/base", "v1"),
    ]
    assert encoder.source == chain / "hub" / "owner" / "base" / "c0ffee"
    assert len(encoder.identity["backbone"]["adapters_sha256"].split()) == 2


def test_settings_without_a_limit_of_their_own(tmp_path):
    """The reference compares numbers: null would stop it."""
    write_settings(tmp_path, Settings(max_length=64, doc_max_length=None))
    assert json.loads((tmp_path / "llm2vec_config.json").read_text())["doc_max_length"] == 64
    assert read_settings(tmp_path) == Settings(max_length=64, doc_max_length=64)
