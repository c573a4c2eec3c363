"""The initialization schemes: plain functions, each with its source, and `initialize`, which applies one to a model."""

import torch
from torch import Tensor, nn

from common.model import MLP

# Each scheme takes a layer whose bias is zero already, the name of the model's activation, and the inputs
# (batch, fan_in) that reach the layer, at which only lsuv looks. The gain makes up for what an activation takes away
# from the signal: √2 for ReLU, 5/3 for tanh in PyTorch.


def zeros(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """All weights 0: every unit of a layer computes the same, and no gradient passes through the layer."""
    nn.init.zeros_(linear.weight)


def constant(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """All weights 1 / fan_in: every unit is the mean of its inputs.

    At step 0 no gradient but rounding errors reaches the hidden layers: the gradients at an image's logits add up to 0
    (softmax), and equal weights pass back only their sum.
    """
    nn.init.constant_(linear.weight, 1 / linear.in_features)


def normal_small(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """N(0, 0.01²) whatever the width, as in AlexNet (Krizhevsky et al. 2012, section 5)."""
    nn.init.normal_(linear.weight, std=0.01)


def normal_large(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """N(0, 1) whatever the width."""
    nn.init.normal_(linear.weight, std=1.0)


def classic_uniform(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """U(±1/√fan_in), so fan_in · Var(w) = 1/3: the heuristic of old (Glorot & Bengio 2010, equations 1 and 15)."""
    bound = linear.in_features**-0.5
    nn.init.uniform_(linear.weight, -bound, bound)


def pytorch_default(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """What `nn.Linear` does by itself: U(±1/√fan_in) for the weights, and for the biases too instead of zero."""
    linear.reset_parameters()


def xavier_uniform(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """U(±√(6 / (fan_in + fan_out))) (Glorot & Bengio 2010, equation 16).

    Without a gain, as in the paper, which takes the activation for linear with slope 1 (equation 4).
    """
    nn.init.xavier_uniform_(linear.weight)


def xavier_normal(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """N(0, 2 / (fan_in + fan_out)) (Glorot & Bengio 2010, equation 12), without a gain like `xavier_uniform`."""
    nn.init.xavier_normal_(linear.weight)


def kaiming_uniform(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """U(±gain · √(3 / fan_in)), of the same variance as `kaiming_normal`."""
    nn.init.kaiming_uniform_(linear.weight, nonlinearity=activation)


def kaiming_normal(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """N(0, gain² / fan_in), for ReLU N(0, 2 / fan_in) (He et al. 2015, arXiv:1502.01852, equation 10)."""
    nn.init.kaiming_normal_(linear.weight, nonlinearity=activation)


def orthogonal(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """A random orthogonal matrix times the gain (Saxe et al. 2014, arXiv:1312.6120, section 3).

    Between layers of the same width it changes the length of no vector except by the gain.
    """
    nn.init.orthogonal_(linear.weight, gain=nn.init.calculate_gain(activation))


def lsuv(linear: nn.Linear, activation: str, inputs: Tensor) -> None:
    """Layer-sequential unit variance (Mishkin & Matas 2016, arXiv:1511.06422, algorithm 1).

    Orthogonal, then divided by the standard deviation of the outputs. The paper repeats that until the variance is 1
    within a tolerance of 0.1; here one division is exact, because without biases the outputs scale with the weights.
    Outputs that do not vary stay as they are: all units before them are dead, or it is one output for one image.
    """
    nn.init.orthogonal_(linear.weight)
    std = linear(inputs).std()
    if std > 0:
        linear.weight /= std  # `initialize` runs without gradients


SCHEMES = [zeros, constant, normal_small, normal_large, classic_uniform, pytorch_default]
SCHEMES += [xavier_uniform, xavier_normal, kaiming_uniform, kaiming_normal, orthogonal, lsuv]
INITIALIZATIONS = {scheme.__name__: scheme for scheme in SCHEMES}


@torch.no_grad()
def initialize(model: MLP, scheme: str, images: Tensor) -> None:
    """Initializes the layers of `model` from first to last; all biases become 0, except with `pytorch_default`.

    Args:
        model: the MLP.
        scheme: a key of `INITIALIZATIONS`. One with a gain gives it to the first layer too, which has no activation
            before it: one factor changes little (He et al. 2015, section 2.2).
        images: a batch (batch, ...) that the layers pass on, for the schemes that look at their inputs.

    Raises:
        ValueError: for an activation for which `nn.init.calculate_gain` knows no gain.

    >>> model = MLP([64, 32], "relu")
    >>> initialize(model, "lsuv", torch.randn(100, 1, 28, 28))
    >>> model.layers[1].bias.abs().max().item()
    0.0
    """
    inputs = images
    for layer in model.layers:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
            INITIALIZATIONS[scheme](layer, model.arguments["activation"], inputs)
        inputs = layer(inputs)
