"""The model without Lightning."""

import inspect
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from common.model import ACTIVATIONS, MLP
from main import main

FORMULAS = {
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,  # Hendrycks & Gimpel 2016, arXiv:1606.08415
    "silu": lambda x: x / (1 + torch.exp(-x)),  # Elfwing et al. 2017, arXiv:1702.03118
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
}


def logits_by_hand(model: MLP, images: Tensor, formula: Callable[[Tensor], Tensor], batch_norm: bool) -> Tensor:
    """Batch normalization by algorithm 1 of Ioffe & Szegedy, which scales and shifts where else the bias is added."""
    parameters = list(model.parameters())
    x = images.flatten(1)
    while len(parameters) > 2:
        x = x @ parameters.pop(0).T
        if batch_norm:
            x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * parameters.pop(0)
        x = formula(x + parameters.pop(0))
    weight, bias = parameters
    return x @ weight.T + bias


@pytest.mark.parametrize("hidden_sizes", [[], [7], [32, 16, 8]])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_logits_are_those_of_the_published_formulas(hidden_sizes: list[int], batch_norm: bool, activation: str):
    torch.manual_seed(0)
    model, images = MLP(hidden_sizes, activation, batch_norm=batch_norm), torch.randn(64, 1, 28, 28)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # a batch norm begins with scale 1 and shift 0
    logits = model(images)
    assert logits.shape == (64, 10)
    torch.testing.assert_close(logits, logits_by_hand(model, images, FORMULAS[activation], batch_norm))


def test_batch_norm_goes_by_the_batch_in_training_only():
    model, images = MLP([16, 8], batch_norm=True), 3 + 2 * torch.randn(256, 1, 28, 28)
    assert not torch.allclose(model(images)[:2], model(images[:2]), atol=1e-2)
    model.eval()
    torch.testing.assert_close(model(images)[:2], model(images[:2]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_zeroes_activations_in_training_and_scales_up_the_others(activation: str):
    torch.manual_seed(0)
    model, images = MLP([10], activation, dropout=0.2), torch.randn(500, 1, 28, 28)
    with torch.no_grad():
        model.layers[-1].weight.copy_(torch.eye(10))  # the logits are what comes out of the dropout
        model.layers[-1].bias.zero_()
        model.eval()
        activations = model(images)
        dropped = model.train()(images)
    where = (dropped == 0) & (activations != 0)
    torch.testing.assert_close(dropped, torch.where(where, 0, activations / 0.8))
    assert 0.17 < where.sum() / (activations != 0).sum() < 0.23


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'step'.*relu, gelu"):
        MLP(activation="step")


def test_arguments_rebuild_the_model():
    model = MLP([5, 4], "tanh", 0.2, batch_norm=True, in_features=6, num_classes=3)
    copy = MLP(**model.arguments)
    assert repr(copy) == repr(model)


def test_command_line_offers_the_activations_of_the_model():
    assert get_args(inspect.signature(main).parameters["activation"].annotation) == tuple(ACTIVATIONS)
