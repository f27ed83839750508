"""Losses and gradients: of the whole computation, of the reference package, of any split."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import llm2vec_gen as oracle
from tiny_data import DIMENSION, setup, write_teacher
from torch.nn.functional import linear, mse_loss

from gen_fast.model.batch import PackedBatch
from gen_fast.model.sources import resolve
from gen_fast.model.token_budget import TokenBudget, saved_bytes_per_token
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.ops.norm import rms_norm
from gen_fast.testing import relative_error
from gen_fast.training import losses
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Example, TrainingData
from gen_fast.training.fitting import fit_alignment
from gen_fast.training.records import Rejections
from gen_fast.training.step import accumulate
from gen_fast.training.student import GPU_PART_TOKENS, Student
from gen_fast.training.validation import validate
from gen_fast.training.world import World


def gradients(student):
    return {name: p.grad.clone() for name, p in student.named_parameters()}


def full_backpropagation(student, examples):
    """The losses with everything run under autograd, and transformers' way of computing them."""
    backbone, k = student.backbone, len(student.special)
    vocabulary, c = backbone.config.vocab_size, student.n_compression
    special = student.special
    queries = [np.concatenate((e.query, np.arange(vocabulary, vocabulary + k))) for e in examples]
    batch = PackedBatch.pack(queries, needed=[c] * len(queries))
    # A gradient for every row of the input, as if the text's own embeddings were trained too.
    stream = backbone.forward(batch, special=special)
    states = rms_norm(stream, backbone.final_norm, backbone.config.norm_eps)
    soft = linear(states, student.reconstruction.weight, student.reconstruction.bias)
    embeddings = linear(soft, student.alignment.weight, student.alignment.bias)
    embeddings = embeddings.view(len(examples), c, -1).mean(1)
    vectors = torch.from_numpy(np.stack([e.vector for e in examples]))
    logits, targets = [], []
    for i, example in enumerate(examples):
        ids = np.concatenate((np.arange(vocabulary, vocabulary + c), example.answer))
        rows = PackedBatch.pack([ids])
        out = backbone.forward(rows, special=soft[i * c : (i + 1) * c])
        out = rms_norm(out, backbone.final_norm, backbone.config.norm_eps)
        logits.append(linear(out, student.head)[c - 1 : -1])
        targets.append(torch.from_numpy(example.answer.astype(np.int64)))
    recon = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))
    return recon, mse_loss(embeddings, vectors)


@pytest.mark.parametrize("n_thought", [0, 4])
def test_frozen_queries_give_the_gradients_of_full_backpropagation(make_config, n_thought):
    config = make_config(n_thought=n_thought, micro_batch_tokens=30, alignment_scale="mean")
    student, data = setup(config)
    examples = data.examples(data.step_rows(0))
    found, _ = accumulate(student, examples, config, World())
    split = gradients(student)
    student.zero_grad()
    recon, aligned = full_backpropagation(student, examples)
    (recon + aligned).backward()
    recon, aligned = recon.detach(), aligned.detach()
    for name, whole in gradients(student).items():
        assert relative_error(split[name], whole) <= 1e-5, name
    assert found.reconstruction == pytest.approx(float(recon), rel=1e-5)
    assert found.alignment == pytest.approx(float(aligned), rel=1e-5)


def check_against_reference(config, student, examples, bound):
    peer = oracle.ReferenceTraining(
        resolve(config.backbone), student.to_adapter(config), torch.float32
    )
    recon, aligned = peer.losses(examples)
    (recon + aligned).backward()
    found, _ = accumulate(student, examples, config, World())
    assert found.reconstruction == pytest.approx(float(recon.detach()), rel=bound)
    assert found.alignment == pytest.approx(float(aligned.detach()), rel=bound)
    theirs = {
        "special": peer.tokens.grad,
        "reconstruction.weight": peer.reconstruction.projection.weight.grad,
        "reconstruction.bias": peer.reconstruction.projection.bias.grad,
        "alignment.weight": peer.alignment.projection.weight.grad,
        "alignment.bias": peer.alignment.projection.bias.grad,
    }
    for name, own in gradients(student).items():
        cosine = torch.nn.functional.cosine_similarity(
            own.double().flatten(), theirs[name].double().flatten(), dim=0
        )
        assert cosine >= 0.99999, (name, float(cosine))


def test_losses_and_gradients_are_those_of_the_reference_package(make_config):
    config = make_config(answer_end="<|end_of_text|>", alignment_scale="mean")
    student, data = setup(config)
    check_against_reference(config, student, data.examples(data.step_rows(0)), 1e-5)


def test_reference_package_with_real_weights(make_config, smollm2):
    config = make_config(
        backbone=str(smollm2),
        n_compression=10,
        answer_end="<|end_of_text|>",
        batch_size=3,
        alignment_scale="mean",
    )
    student, data = setup(config)
    check_against_reference(config, student, data.examples(data.step_rows(0)), 1e-5)


def test_token_ids_are_those_of_the_reference_package(make_config, smollm2):
    from llm2vec_gen.dataset import CustomCollator
    from llm2vec_gen.dataset.base_dataset import DataSample

    config = make_config(
        backbone=str(smollm2), n_compression=10, answer_end="<|end_of_text|>", max_length=18
    )
    tokenizer = load_tokenizer(smollm2)
    data = TrainingData(config, tokenizer, Rejections(Path(config.out)))
    rows = data.step_rows(0)
    tokens = [f"<question{i}>" for i in range(10)]
    auto = tokenizer.transformers
    auto.add_special_tokens({"additional_special_tokens": tokens})
    auto.padding_side, auto.pad_token = "left", auto.eos_token
    collate = CustomCollator(auto, tokens, padding="longest", max_length=18)
    samples = [DataSample(i, row.query, row.answer) for i, row in enumerate(rows)]
    theirs = collate(samples)
    for i, example in enumerate(data.examples(rows)):
        mask = theirs["query_attention_mask"][i].bool()
        assert theirs["query_input_ids"][i][mask][:-10].tolist() == example.query.tolist()
        mask = theirs["answer_attention_mask"][i].bool()
        assert theirs["answer_input_ids"][i][mask].tolist() == example.answer.tolist()[:18]


@pytest.mark.parametrize("weights", [
    {"repeat_weight": 0.5},
    {"negative_weight": 0.5},
    {"negative_weight": 0.5, "margin_weight": 0.5, "margin": 3.0},
    {"contrastive_weight": 0.5, "repeat_weight": 0.1},
    {"reconstruction_weight": 0.0, "repeat_weight": 0.5},
    {"alignment_weight": 0.0},
    {"alignment": "cosine"},
])  # fmt: skip
def test_every_loss_falls_along_its_gradient(make_config, weights):
    """The gradient is that of the reported total: a central difference along it agrees."""
    config = make_config(negatives=True, n_thought=1, **weights)
    student, data = setup(config)
    examples = data.examples(data.step_rows(0))
    accumulate(student, examples, config, World())
    grads = gradients(student)
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    totals = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter += (sign if sign > 0 else -2) * 1e-2 * grads[name] / norm
        totals.append(accumulate(student, examples, config, World())[0].total)
    assert (totals[0] - totals[1]) / 2e-2 == pytest.approx(float(norm), rel=2e-2)


def test_losses_between_texts_are_those_of_the_reference_package():
    from llm2vec_gen import losses as theirs

    torch.manual_seed(0)
    a, b, c = torch.randn(3, 5, 8).unbind()
    torch.testing.assert_close(losses.margin(a, b, 4.0), theirs.compute_margin_loss(a, b, 4.0))
    expected = theirs.compute_contrastive_loss(a, b, c, scale=20.0, function="cosine")
    torch.testing.assert_close(losses.contrastive(a, b, c, 20.0), expected)


def test_parts_of_a_batch_give_what_the_whole_gives(make_config):
    config = make_config(negatives=True, repeat_weight=1.0, negative_weight=1.0)
    student, data = setup(config)
    examples = data.examples(data.step_rows(0))
    whole, _ = accumulate(student, examples, config, World())
    expected = gradients(student)
    parts = make_config(
        negatives=True, repeat_weight=1.0, negative_weight=1.0, micro_batch_tokens=1
    )
    found, _ = accumulate(student, examples, parts, World())
    assert found.total == pytest.approx(whole.total, rel=1e-6)
    for name, gradient in gradients(student).items():
        assert relative_error(gradient, expected[name]) <= 1e-5


def test_special_tokens_start_like_the_embedding_table(make_config):
    config = make_config(n_compression=400)
    student, _ = setup(config)
    table = student.backbone.embedding
    special = student.special.detach()
    assert ((special.mean(0) - table.mean(0)).abs() / table.std(0)).max() < 0.2
    assert ((special.std(0) - table.std(0)).abs() / table.std(0)).max() < 0.2
    mean, _ = setup(make_config(special_init="mean"))
    torch.testing.assert_close(mean.special.detach(), table.mean(0).expand(3, -1))


def alignment_alone(config):
    """The alignment loss of a fitted student, and its gradient's norm at the special tokens."""
    student, data = setup(config)
    fit_alignment(student, data.examples(data.train))
    found, _ = accumulate(student, data.examples(data.step_rows(0)), config, World())
    return found.alignment, float(student.special.grad.norm())


def test_weight_1_of_alignment_means_the_same_for_every_teacher(make_config):
    found = {}
    for size in (1.0, 0.01):
        for scale in ("variance", "dimension", "mean"):
            config = make_config(alignment_scale=scale, reconstruction_weight=0.0)
            write_teacher(Path(config.teacher), Path(config.answers[0]), size=size)
            found[scale, size] = alignment_alone(config)
    assert found["variance", 0.01] == pytest.approx(found["variance", 1.0], rel=1e-4)
    for size in (1.0, 0.01):
        loss, norm = found["mean", size]
        assert found["dimension", size] == pytest.approx((DIMENSION * loss, DIMENSION * norm))
    for loss, _ in (found["mean", 0.01], found["dimension", 0.01]):
        assert loss < 0.01  # what a short vector costs is not heard beside cross-entropy


def test_predicting_the_mean_of_the_teacher_costs_1(make_config):
    config = make_config(batch_size=32)
    student, data = setup(config)
    vectors = np.stack([example.vector for example in data.examples(data.train)])
    with torch.no_grad():
        student.alignment.weight.zero_()
        student.alignment.bias.copy_(torch.from_numpy(vectors.mean(0)))
    found, _ = accumulate(student, data.examples(data.train), config, World())
    assert found.alignment == pytest.approx(1, rel=1e-5)
    assert data.teacher_variance == pytest.approx(vectors.var(0).mean(), rel=1e-5)


def test_validation_has_the_scale_of_training(make_config):
    config = make_config(negatives=True, repeat_weight=1.0, negative_weight=1.0)
    student, data = setup(config)
    examples = data.examples(data.validation)
    found, _ = accumulate(student, examples, config, World())
    assert validate(student, examples, config).alignment == pytest.approx(found.alignment)
    mean, _ = setup(replace(config, alignment_scale="mean"))
    unscaled, _ = accumulate(mean, examples, config, World())
    for name in ("alignment", "repeat", "negative"):
        scaled = getattr(unscaled, name) / data.teacher_variance
        assert getattr(found, name) == pytest.approx(scaled, rel=1e-5)


def test_empty_query_is_its_special_tokens(make_config):
    config = make_config()
    student, _ = setup(config)
    empty = Example(np.empty(0, np.int64), np.array([5, 2]), np.ones(16, np.float32))
    found, _ = accumulate(student, [empty], config, World())
    assert np.isfinite(found.total)


def test_bfloat16_is_close_to_float32(make_config, smollm2):
    # One text: where bfloat16 is computed in software, it takes seconds.
    config = make_config(backbone=str(smollm2), n_compression=10, batch_size=1)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        student, data = setup(config, dtype)
        found[dtype] = accumulate(student, data.examples(data.step_rows(0)), config, World())[0]
    assert found[torch.bfloat16].total == pytest.approx(found[torch.float32].total, rel=5e-2)


def test_config_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="must be given"):
        TrainConfig()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("micro_batch_tokens", [None, 200])
def test_a_part_that_runs_out_of_memory_is_halved_and_counted_once(
    make_config, monkeypatch, where, micro_batch_tokens
):
    config = make_config(micro_batch_tokens=micro_batch_tokens)
    student, data = setup(config)
    examples = data.examples(data.step_rows(0))
    expected_losses, _ = accumulate(student, examples, config, World())
    expected = gradients(student)
    whole = sum(len(e.answer) + student.n_compression - 1 for e in examples)
    sizes = []
    answer_states = Student.answer_states

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def too_large(self, soft, answers):
        """Fails where a part has more than half of the batch's tokens."""
        states = answer_states(self, soft, answers)
        tokens = sum(len(ids) + student.n_compression - 1 for ids in answers)
        sizes.append(tokens)
        if tokens > whole // 2:
            if where == "forward":
                fail()
            # When the soft prompts have their gradient already.
            soft.register_hook(fail)
        return states

    monkeypatch.setattr(Student, "answer_states", too_large)
    student.zero_grad()
    for _ in range(2):
        found, _ = accumulate(student, examples, config, World())
        assert found.total == pytest.approx(expected_losses.total, rel=1e-6)
        for name, gradient in gradients(student).items():
            assert relative_error(gradient, expected[name]) <= 1e-5
    # The next step begins with what has fitted.
    assert [size > whole // 2 for size in sizes].count(True) == 1


def test_another_error_of_a_part_is_not_survived(make_config, monkeypatch):
    config = make_config()
    student, data = setup(config)

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Student, "answer_states", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        accumulate(student, data.examples(data.step_rows(0)), config, World())


def test_parts_on_a_gpu_fit_half_of_the_free_memory(make_config, monkeypatch):
    student, _ = setup(make_config())
    backbone = student.backbone
    need = saved_bytes_per_token(backbone)
    assert need == 4 * backbone.config.num_layers * (
        2 * backbone.config.hidden_size
        + 2 * backbone.config.intermediate_size
        + 2 * (backbone.config.q_size + backbone.config.kv_size)
    )
    monkeypatch.setattr(type(backbone), "device", torch.device("cuda"))
    for free, tokens in ((1 << 40, 16384), (2 * 4096 * need, 4096), (1, 512)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 1 << 40))
        budget = TokenBudget(backbone, gpu_tokens=GPU_PART_TOKENS, bytes_per_token=need)
        assert budget.tokens == tokens
