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


def test_dropout_acts_in_training_only():
    model, images = MLP([64], dropout=0.5), torch.randn(4, 1, 28, 28)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'step'.*relu, gelu"):
        MLP(activation="step")


def test_arguments_rebuild_the_model():
    model = MLP([5, 4], "tanh", 0.2)
    copy = MLP(**model.arguments)
    assert repr(copy) == repr(model)


def test_command_line_offers_the_activations_of_the_model():
    assert get_args(inspect.signature(main).parameters["activation"].annotation) == tuple(ACTIVATIONS)
