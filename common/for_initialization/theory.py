"""The theory of signals in wide random networks: how large they are in each layer, forwards and backwards.

Both recursions assume that the weights are independent, of mean zero and of one variance in a layer, and that layers
are so wide that a pre-activation is Gaussian (central limit theorem). For tanh they are the mean field theory of Poole
et al. 2016 (arXiv:1606.05340) and Schoenholz et al. 2017 (arXiv:1611.01232). For ReLU the integrals E[φ(√q z)²] and
E[φ'(√q z)²] below are q/2 and 1/2, which makes them equations 8 and 12 of He et al. 2015 (arXiv:1502.01852), and the
condition that nothing changes from layer to layer is He's equation 10: fan_in · Var(w) / 2 = 1.

A second moment is the mean of squares, E[z²]: the variance, where the mean is zero.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common.model import ACTIVATIONS, MLP

# The Gaussian integral as a sum over a fine grid: tanh' is a peak of width 1/√q, which the nodes of Gauss-Hermite
# quadrature miss where q is large. The number of points is even, so that ReLU's kink at 0 lies between two of them.
GAUSSIAN_Z = torch.linspace(-10, 10, 2000, dtype=torch.float64)
GAUSSIAN_PROBABILITIES = torch.softmax(-GAUSSIAN_Z.square() / 2, dim=0)  # exp(-z²/2), scaled to sum 1


def forward_moments(
    activation: Callable[[Tensor], Tensor],
    inputs: Tensor,
    weight_factors: Sequence[float],
    bias_variances: Sequence[float],
) -> Tensor:
    """Second moment q of the pre-activations in each layer: q_l = fan_in·Var(w_l) · E[φ(√q_{l-1} z)²] + Var(b_l).

    z ~ N(0, 1); the first layer takes E[x²] for the integral. Poole et al. 2016, equation 3, for ReLU He et al. 2015,
    equation 8.

    Args:
        activation: φ, elementwise.
        inputs: E[x²] over the pixels of each image (images,).
        weight_factors: fan_in · Var(w) of each layer.
        bias_variances: Var(b) of each layer.

    Returns:
        q (layers, images)
    """
    signal, moments = inputs.double(), []
    for factor, bias_variance in zip(weight_factors, bias_variances, strict=True):
        moments.append(factor * signal + bias_variance)
        z = moments[-1].sqrt()[:, None] * GAUSSIAN_Z
        signal = activation(z).square() @ GAUSSIAN_PROBABILITIES
    return torch.stack(moments)


def backward_moments(
    activation: Callable[[Tensor], Tensor], moments: Tensor, weight_factors: Sequence[float], last: float
) -> Tensor:
    """Second moment δ² of the loss's gradient with respect to the pre-activations, from the last layer to the first.

    δ²_l = E[φ'(√q_l z)²] · fan_out·Var(w_{l+1}) · δ²_{l+1} (Schoenholz et al. 2017, section 4; the first two factors
    are their χ₁; for ReLU He et al. 2015, equation 12). It also assumes that the weights on the way back are
    independent of those on the way forward.

    Args:
        activation: φ, elementwise.
        moments: q (layers, images) from `forward_moments`.
        weight_factors: fan_out · Var(w) of each layer.
        last: δ² of the last layer, the logits.

    Returns:
        δ² (layers, images), in the order of the layers.
    """
    deltas = [torch.full_like(moments[-1], last)]
    for layer in reversed(range(len(moments) - 1)):
        z = (moments[layer].sqrt()[:, None] * GAUSSIAN_Z).requires_grad_()
        (slope,) = torch.autograd.grad(activation(z).sum(), z)
        deltas.append(slope.square() @ GAUSSIAN_PROBABILITIES * weight_factors[layer + 1] * deltas[-1])
    return torch.stack(deltas).flip(0)


def predict_stds(model: MLP, images: Tensor, last_std: float) -> dict[str, list[float]]:
    """Standard deviation of the pre-activations and of their gradients in each layer, over all images and units.

    Args:
        model: its activation is `nn.ReLU` or `nn.Tanh`; of its weights only the variances count.
        images: a batch (batch, ...).
        last_std: standard deviation of the gradient at the logits, from which the gradients start.

    Returns:
        "preactivations" and "gradients", lists from the first layer to the last.
    """
    layers = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
    activation = ACTIVATIONS[model.arguments["activation"]]()
    forward_factors = [layer.in_features * layer.weight.var(correction=0).item() for layer in layers]
    backward_factors = [layer.out_features * layer.weight.var(correction=0).item() for layer in layers]
    bias_variances = [layer.bias.var(correction=0).item() for layer in layers]
    moments = forward_moments(activation, images.square().flatten(1).mean(dim=1), forward_factors, bias_variances)
    deltas = backward_moments(activation, moments, backward_factors, last_std**2)
    return {"preactivations": moments.mean(dim=1).sqrt().tolist(), "gradients": deltas.mean(dim=1).sqrt().tolist()}
