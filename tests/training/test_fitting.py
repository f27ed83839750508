"""The alignment in closed form."""

import torch
from tiny_data import setup

from gen_fast.training.fitting import RIDGE, _features, fit_alignment


def test_no_other_linear_map_is_better(make_config):
    """The gradient of ridge regression's own objective vanishes at the fitted alignment."""
    student, data = setup(make_config(repeat_weight=1.0))
    examples = data.examples(data.train)
    fit_alignment(student, examples)
    features, vectors = _features(student, examples)
    assert len(features) == 2 * len(examples)  # queries and repeated answers
    weight = student.alignment.weight.detach().double().requires_grad_()
    bias = student.alignment.bias.detach().double().requires_grad_()
    error = features @ weight.T + bias - vectors
    variance = features.var(0, unbiased=False).mean()
    loss = error.square().sum(1).mean() + RIDGE * variance * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    size = (vectors.T @ features).abs().max() / len(features)
    assert all(gradient.abs().max() < 1e-4 * size for gradient in gradients)
