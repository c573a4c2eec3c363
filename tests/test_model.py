"""The model without Lightning."""

import inspect
from itertools import pairwise
from typing import get_args

import pytest
import torch

from common.model import ACTIVATIONS, MLP
from main import main


@pytest.mark.parametrize("hidden_sizes", [[], [7], [32, 16, 8]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_images_in_logits_out(hidden_sizes: list[int], activation: str):
    model = MLP(hidden_sizes, activation, dropout=0.5)
    assert model(torch.randn(4, 1, 28, 28)).shape == (4, 10)
    sizes = [28 * 28, *hidden_sizes, 10]
    parameters = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(sizes))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_batch_norm_normalizes_each_unit_over_the_batch_and_evaluation_over_what_training_saw():
    torch.manual_seed(0)
    model, images = MLP([16, 8], "relu", batch_norm=True), 3 + 2 * torch.randn(256, 1, 28, 28)
    parameters = sum(fan_in * fan_out + 2 * fan_out for fan_in, fan_out in [(28 * 28, 16), (16, 8)]) + (8 + 1) * 10
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    [(_, linear), (_, norm)] = list(model.layers.named_children())[1:3]
    normalized = norm(linear(images.flatten(1)))
    torch.testing.assert_close(normalized.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std(0, correction=0), torch.ones(16), atol=1e-3, rtol=0)
    # An image's logits depend on its batch in training, and not in evaluation.
    assert not torch.allclose(model(images)[:2], model(images[:2]), atol=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    torch.testing.assert_close(model(images)[:2], model(images[:2]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_acts_in_training_only():
    model, images = MLP([64], dropout=0.5), torch.randn(4, 1, 28, 28)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'step'.*relu, gelu"):
        MLP(activation="step")


def test_arguments_rebuild_the_model():
    model = MLP([5, 4], "tanh", 0.2, batch_norm=True)
    copy = MLP(**model.arguments)
    assert repr(copy) == repr(model)


def test_command_line_offers_the_activations_of_the_model():
    assert get_args(inspect.signature(main).parameters["activation"].annotation) == tuple(ACTIVATIONS)
