"""GEM's steps against plain transformers with a dense mask, and as whole runs."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from oracles import gem as oracle
from oracles.lora import gradients_of, weight_gradients_of
from tiny_runs import gem_configs, kill_past, losses, run_in_ranks
from typer.testing import CliRunner

import gen_fast
from gen_fast.cli import app
from gen_fast.formats.gem import read_special
from gen_fast.formats.peft import read_adapter
from gen_fast.model.full import FullWeights
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.testing import relative_error, save_tiny_model
from gen_fast.training.adapted_task import Data
from gen_fast.training.contrastive import embed
from gen_fast.training.gem import GEMTask, drop_tokens, masked, plain, train
from gen_fast.training.gem_config import GEMConfig
from gen_fast.training.records import Rejections, read_records
from gen_fast.training.trainer import Stepper
from gen_fast.training.world import World

# ------------------------------------------------------------------ against plain transformers


def make_task(directory, **settings):
    """A task over random texts, what it trains away from where it begins."""
    backbone = load_backbone(directory)
    values = {
        "texts": ("-",),
        "out": "-",
        "backbone": str(directory),
        "device": "cpu",
        "dtype": "float32",
        "n_special": 3,
        "lora_rank": None if settings.get("full") else 4,
        "batch_size": 6,
        "plain_probability": 0.5,
        "alpha": 0.4,
        "alpha_start_step": 0,
        "drop_rate": 0.3,
        "seed": 2,
    }
    config = GEMConfig(**(values | settings))
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 200, n).astype(np.int32) for n in (9, 14, 2, 23, 11, 6, 17, 8)]
    head = load_head(directory, backbone)
    task = GEMTask(
        backbone, head, config, Rejections(Path("-")), Data(rows, rows[:4], ""), np.array([1, 2])
    )
    torch.manual_seed(3)
    with torch.no_grad():
        update = task.linears.update
        # With 0.3 transformers' own float32 is 2e-4 away from float64.
        for parameter in update.parameters() if task.config.full else update.b:
            parameter.add_(0.05 * torch.randn_like(parameter))
        task.parameters.special.normal_(std=0.1)
    return task


def trained(model, update):
    """The model of transformers with what is trained in its linears: leaves, by their names."""
    if isinstance(update, FullWeights):
        return with_weights(model, update)
    return lettered(adapted(model, update))


def gradients(update, config):
    """Of what is trained, by the same names."""
    if isinstance(update, FullWeights):
        return weight_gradients_of(update, config)
    return lettered(gradients_of(update, config))


def lettered(pairs):
    """Factors A and B by names of their own."""
    return {
        f"{name}.{letter}": factor
        for name, pair in pairs.items()
        for letter, factor in zip("AB", pair, strict=True)
    }


def with_weights(model, full):
    """The model of transformers with these weights in its linears, and no others that train."""
    model.requires_grad_(False)
    leaves = {}
    for name, weight in full.weights().items():
        leaf = model.get_submodule(f"model.{name}").weight
        leaf.copy_(weight)
        leaves[name] = leaf.requires_grad_()
    return leaves


def adapted(model, lora):
    """The model of transformers with the factors in its linears, as leaves with gradients."""
    leaves = {}
    for name, (a, b) in lora.factors().items():
        a, b = (factor.clone().requires_grad_() for factor in (a, b))
        leaves[name] = a, b
        linear = model.get_submodule(f"model.{name}")

        def forward(x, linear=linear, a=a, b=b):
            own = torch.nn.functional.linear(x, linear.weight, linear.bias)
            return own + lora.config.scale * (x @ a.T) @ b.T

        linear.forward = forward
    return leaves


def oracle_losses(model, base, task, examples, special, log_scale):
    """The losses, written out from the paper with a dense mask a text; and how far base is."""
    told, moved, embeddings = [], [], {"anchor": [], "positive": []}
    for example in examples:
        text = example.text
        states = oracle.states(model, text.ids, special, text.block)
        first, after = text.block
        for row in range(len(text.ids) - 1):
            # Not the special tokens' rows, nor what would tell a special token.
            if first <= row < after or first <= row + 1 < after:
                continue
            target = torch.tensor(int(text.ids[row + 1]))
            logits = model.lm_head(states[row])
            told.append(torch.nn.functional.cross_entropy(logits, target))
            if after:
                continue
            with torch.no_grad():
                before = base(torch.from_numpy(text.ids.astype(np.int64))[None]).logits[0, row]
            log_p, log_q = before.log_softmax(-1), logits.log_softmax(-1)
            moved.append((log_p.exp() * (log_p - log_q)).sum())
        for name, view in example.match.views().items():
            m = view.needed
            block = len(view.ids) - m, len(view.ids)
            states = oracle.states(model, view.ids, special, block)[-m:]
            is_mean = task.config.pooling == "mean"
            embeddings[name].append(states.mean(0) if is_mean else states.flatten())
    rows = [torch.nn.functional.normalize(torch.stack(x), dim=-1) for x in embeddings.values()]
    scores = log_scale.exp() * rows[0] @ rows[1].T
    contrastive = torch.nn.functional.cross_entropy(scores, torch.arange(len(examples)))
    kept = torch.stack(moved).mean() if moved else torch.zeros(())
    return torch.stack(told).mean(), contrastive, kept


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.4},
        {"form": "insert", "pooling": "concat"},
        {"alpha": 0.0, "n_special": 1, "base_weight": 0.7},
        {"alpha": 1.0, "plain_probability": 0.0},
        {"alpha": 1.0, "base_weight": 2.0},
        {"full": True, "base_weight": 0.7},
        {"full": True, "form": "insert", "pooling": "concat"},
    ],
    ids=str,
)
def test_losses_and_gradients_of_a_mixed_batch_are_those_of_transformers(
    tmp_path, family, settings
):
    model = save_tiny_model(tmp_path, family)
    base = copy.deepcopy(model)
    task = make_task(tmp_path, **settings)
    examples = task.examples(0, World())
    blocks = {example.text.block != (0, 0) for example in examples}
    assert len(blocks) == (1 if task.config.plain_probability == 0 else 2)
    progress = task.accumulate(examples, World())

    leaves = trained(model, task.linears.update)
    special = task.parameters.special.detach().clone().requires_grad_()
    log_scale = task.parameters.log_scale.detach().clone().requires_grad_()
    told, contrastive, kept = oracle_losses(model, base, task, examples, special, log_scale)
    alpha = task.config.alpha
    total = (1 - alpha) * told + alpha * contrastive + task.config.base_weight * kept
    total.backward()

    expected = {"total": total, "next_token": told, "contrastive": contrastive, "base": kept}
    assert ("base" in progress.losses) == bool(task.config.base_weight)
    for name, value in progress.losses.items():
        assert value == pytest.approx(float(expected[name].detach()), rel=1e-5), name
    pairs = {"special": (task.parameters.special.grad, special.grad)}
    if alpha:
        pairs["log_scale"] = task.parameters.log_scale.grad, log_scale.grad
    for name, own in gradients(task.linears.update, task.backbone.config).items():
        pairs[name] = own, leaves[name].grad
    for name, (actual, wanted) in pairs.items():
        if wanted is None or not float(wanted.norm()):
            assert not actual.any(), name
            continue
        cosine = torch.nn.functional.cosine_similarity(
            actual.flatten().double(), wanted.flatten().double(), dim=0
        )
        assert float(cosine) >= 0.99999, name
        assert relative_error(actual, wanted) <= 1e-4, name


# ------------------------------------------------------------------ what is drawn and told


def test_what_is_told_is_all_but_the_special_tokens_rows():
    special = np.array([500, 501])
    text = masked(np.array([7, 8, 9]), np.array([17, 18, 19]), special, 0)
    assert text.ids.tolist() == [7, 8, 9, 500, 501, 17, 18, 19]
    assert text.places.tolist() == [1, 2, 6, 7]
    assert text.targets.tolist() == [8, 9, 18, 19]
    assert text.block == (3, 5)
    assert plain(np.array([7, 8, 9]), 0).targets.tolist() == [8, 9]
    suffix = masked(np.array([7, 8, 9]), np.array([17, 18]), special, 0, whole=False)
    assert suffix.targets.tolist() == [18]


def test_dropped_tokens_are_drawn_and_one_stays():
    ids = np.array([1, *range(10, 1010), 2])
    kept = drop_tokens(ids, 0.1, np.array([1, 2]), np.random.default_rng(0))
    assert (kept[0], kept[-1]) == (1, 2)
    assert np.array_equal(kept, ids[np.isin(ids, kept)])  # in order
    assert len(ids) - len(kept) == pytest.approx(100, abs=40)
    for seed in range(20):
        few = drop_tokens(np.array([1, 5, 6]), 0.99, np.array([1]), np.random.default_rng(seed))
        assert len(few) >= 2


def test_what_is_drawn_follows_from_the_seed_and_the_number(tiny_model):
    task = make_task(tiny_model, form="insert", batch_size=8)
    first, again, later = (task.examples(step, World()) for step in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.text.ids, b.text.ids)
        assert np.array_equal(a.match.positive.ids, b.match.positive.ids)
    assert any(len(a.text.ids) != len(b.text.ids) for a, b in zip(first, later, strict=True))
    for example in first:
        first_special, after = example.text.block
        if after:
            assert first_special > 0
            assert after < len(example.text.ids)
    keys = [k for e in first for k in (e.text.key, e.match.anchor.key, e.match.positive.key)]
    assert len(set(keys)) == 24


def test_alpha_is_a_step_or_a_ramp():
    def alphas(**settings):
        config = GEMConfig(texts=("-",), out="-", **settings)
        return [config.alpha_at(step) for step in (0, 9, 10, 11, 13, 14, 99)]

    assert alphas(alpha=1.0, alpha_start_step=10) == [0, 0, 1, 1, 1, 1, 1]
    ramp = alphas(alpha=0.5, alpha_start_step=10, alpha_ramp_steps=4)
    assert ramp == [0, 0, 0.125, 0.25, 0.5, 0.5, 0.5]


def test_the_learning_rate_follows_half_a_cosine_and_changes_with_the_contrastive_loss(tiny_model):
    stepper = Stepper(
        make_task(
            tiny_model,
            learning_rate=1e-3,
            contrastive_learning_rate=1e-4,
            alpha_start_step=6,
            steps=10,
        )
    )
    rates = []
    for taken in (0, 5, 6, 10):
        stepper.taken = taken
        rates.append(stepper.rate)
    half = (1 + math.cos(math.pi * 0.6)) / 2
    assert rates == pytest.approx([1e-3, 5e-4, 1e-4 * half, 0.0], abs=1e-12)


def test_the_scale_of_the_cosines_stays_in_its_bounds(tiny_model):
    task = make_task(tiny_model)
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        with torch.no_grad():
            task.parameters.log_scale.fill_(value)
        task.constrain()
        assert float(task.parameters.log_scale.detach()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "kind",
    [
        {"form": "reconstruct", "lora_dropout": 0.1},
        {"form": "insert", "lora_dropout": 0.1},
        {"full": True},
    ],
    ids=str,
)
def test_parts_and_recomputation_change_nothing(tiny_model, kind):
    def gradients(**settings):
        task = make_task(tiny_model, base_weight=0.5, **kind, **settings)
        losses = task.accumulate(task.examples(0, World()), World()).losses
        return losses, [p.grad for p in task.parameters.parameters()]

    losses, expected = gradients()
    for settings in ({"micro_batch_tokens": 40}, {"recompute": True}):
        other, actual = gradients(**settings)
        assert other == pytest.approx(losses, rel=1e-5)
        for own, wanted in zip(actual, expected, strict=True):
            assert relative_error(own, wanted) <= 2e-5


# ------------------------------------------------------------------ whole runs


@pytest.fixture
def make_config(tiny_model, tmp_path):
    """Call with settings to get a configuration over fresh texts."""
    return gem_configs(tmp_path, tiny_model)


def model_bytes(config):
    names = ("adapter_model.safetensors", "special.safetensors", "gem.json")
    return [(Path(config.out) / "adapter" / name).read_bytes() for name in names]


@pytest.mark.parametrize("form", ["reconstruct", "insert"])
def test_stopped_and_continued_gives_the_same_bytes(make_config, form):
    whole = make_config("whole", form=form)
    folder = train(whole, show_progress_bar=False)
    train(make_config("parts", form=form, steps=2), show_progress_bar=False)
    parts = make_config("parts", form=form)
    train(parts, show_progress_bar=False)
    assert losses(parts) == losses(whole)
    assert model_bytes(parts) == model_bytes(whole)
    rows = read_records(Path(whole.out) / "metrics.jsonl")
    assert [r["step"] for r in rows if "validation/loss" in r] == [2, 4]
    assert all("validation/suffix" in r for r in rows if "validation/loss" in r)
    assert all(0 < r["validation/base"] < 1 for r in rows if "validation/loss" in r)
    assert f"GEM, 2 special tokens, {form}: 4 steps" in (folder / "README.md").read_text()
    assert read_adapter(folder).base == whole.backbone
    rejected = read_records(Path(whole.out) / "rejected.jsonl")
    assert {row["reason"] for row in rejected} == {"empty text", "fewer than two tokens"}


@pytest.mark.usefixtures("one_thread")
def test_killed_and_continued_gives_the_same_bytes(make_config):
    settings = {"steps": 30, "schedule_steps": 30, "checkpoint_every": 3, "validation_rows": 2}
    whole = make_config("whole", alpha_start_step=6, **settings)
    train(whole, show_progress_bar=False)
    killed = make_config("killed", alpha_start_step=6, **settings)
    kill_past(9, train, killed)
    train(killed, show_progress_bar=False)
    assert model_bytes(killed) == model_bytes(whole)
    assert losses(killed) == losses(whole)


def test_two_ranks_give_what_one_gives(make_config):
    """Also the gradient of the scale, which every rank computes whole."""
    one = make_config("one", lora_dropout=0.1, base_weight=0.5)
    train(one, show_progress_bar=False)
    two = make_config("two", lora_dropout=0.1, base_weight=0.5)
    run_in_ranks(train, two)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    own, other = (read_special(Path(config.out) / "adapter") for config in (one, two))
    assert other.log_scale == pytest.approx(own.log_scale, abs=1e-6)
    assert relative_error(other.special, own.special) <= 1e-4


def test_the_embedding_in_training_is_that_of_the_encoder(make_config):
    for pooling, dimension in (("mean", 48), ("concat", 96)):
        config = make_config(pooling, pooling=pooling, learning_rate=1e-2)
        folder = train(config, show_progress_bar=False)
        task = GEMTask.load(config)
        task.restore(folder)
        rows = task._data.validation
        views = [task._view(ids, 0) for ids in rows]
        with torch.no_grad():
            expected = embed(task._trained, views, None, pooling)
        encoder = gen_fast.load(folder, dtype="float32", device="cpu")
        assert (encoder.method, encoder.dimension, encoder.max_length) == ("gem", dimension, 24)
        texts = [encoder._tokenizer.decode(ids) for ids in rows]
        actual = encoder.encode(texts)
        assert relative_error(torch.from_numpy(actual), expected) <= 1e-5


def test_a_run_learns_also_in_bfloat16(make_config, monkeypatch):
    # Where bfloat16 is computed in software, measuring takes longer than the run.
    monkeypatch.setattr("gen_fast.training.trainer.matmul_peak", lambda *_: 1e12)
    config = make_config(
        steps=30,
        schedule_steps=60,
        learning_rate=3e-3,
        batch_size=52,
        alpha_start_step=0,
        dtype="bfloat16",
        validate_every=30,
        checkpoint_every=30,
    )
    train(config, show_progress_bar=False)
    curve = losses(config)
    assert np.mean([curve[i] for i in (28, 29, 30)]) < 0.85 * curve[1]


def test_the_command_line_trains(make_config, tmp_path):
    config = make_config("run", steps=1)
    path = tmp_path / "settings.yaml"
    values = {k: v for k, v in config.plain().items() if k not in ("texts", "out", "backbone")}
    path.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(
        app,
        [
            *("train", config.texts[0], "--method", "gem", "--config", str(path), "-q"),
            *("--model", config.backbone, "--out", config.out),
        ],
    )
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "run" / "adapter") in result.output
    result = CliRunner().invoke(app, ["train", "x.txt", "--method", "gem", "--teacher", "minilm"])
    assert "--teacher means nothing with --method gem" in result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plain_probability": 1.5}, r"plain_probability must be in \[0, 1\]"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\]"),
        ({"drop_rate": 0.0}, "drop_rate must be between 0 and 1"),
        ({"base_weight": -1.0}, "base_weight must not be negative"),
        ({"alpha_start_step": -1}, "alpha_start_step must not be negative"),
        ({"contrastive_scale": 0.5}, r"contrastive_scale must be in \[1, 100\]"),
        ({"n_special": 0}, "n_special must be positive"),
        ({"n_special": 23}, "leave no two of a text in max_length 24"),
        ({"form": "around"}, "form must be reconstruct or insert"),
        ({"pooling": "max"}, "pooling must be mean or concat"),
        ({"schedule": "square"}, "schedule must be linear or cosine"),
        ({"batch_size": 60}, "as each other's negatives"),
        ({"max_length": 400}, "the model was made for 512"),
        ({"dtype": "float16"}, "float16 loses small gradients"),
    ],
)
def test_settings_without_meaning_are_refused(make_config, settings, message):
    with pytest.raises(gen_fast.ConfigError, match=message):
        train(make_config(**settings), show_progress_bar=False)


def test_a_run_goes_on_from_another_and_only_from_the_same_data(make_config, tmp_path):
    first = train(make_config("first", steps=2, learning_rate=1e-2), show_progress_bar=False)
    second = make_config("second", steps=1, lora_start=str(first), learning_rate=1e-9)
    folder = train(second, show_progress_bar=False)
    assert relative_error(read_special(folder).special, read_special(first).special) <= 1e-5
    with pytest.raises(gen_fast.AdapterError, match=r"special tokens \[2, 48\] do not fit"):
        train(make_config("third", lora_start=str(first), n_special=3), show_progress_bar=False)
    (tmp_path / "texts.txt").write_text((tmp_path / "texts.txt").read_text()[::-1].strip())
    again = make_config("second", lora_start=str(first), learning_rate=1e-9)
    with pytest.raises(gen_fast.CheckpointError, match="data"):
        train(again, show_progress_bar=False)
