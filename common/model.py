"""The model: a plain `nn.Module` that knows nothing of Lightning and runs without it."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Multilayer perceptron: [Linear → activation → Dropout] for each hidden size, then Linear.

    Args:
        hidden_sizes: units of each hidden layer; an empty list gives logistic regression.
        activation: a key of `ACTIVATIONS`.
        dropout: probability of zeroing a hidden unit while training, in [0, 1).
        batch_norm: whether a batch normalization stands between each hidden layer's Linear and its activation
            (Ioffe & Szegedy 2015, arXiv:1502.03167). It has a bias of its own, so that of the Linear is left out.
        in_features: pixels of an image.
        num_classes: logits of an image.

    Raises:
        ValueError: for an unknown activation.

    Shape:
        images (batch, ...) with `in_features` values each → logits (batch, num_classes)

    >>> import torch
    >>> MLP([64, 32])(torch.zeros(5, 1, 28, 28)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (768, 384),
        activation: str = "gelu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        in_features: int = 28 * 28,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, allowed: {', '.join(ACTIVATIONS)}")
        # Plain values, so that a checkpoint can carry them and rebuild this model.
        self.arguments = {
            "hidden_sizes": list(hidden_sizes),
            "activation": activation,
            "dropout": dropout,
            "batch_norm": batch_norm,
            "in_features": in_features,
            "num_classes": num_classes,
        }
        sizes = [in_features, *hidden_sizes]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes):
            layers.append(nn.Linear(fan_in, fan_out, bias=not batch_norm))
            layers += [nn.BatchNorm1d(fan_out)] if batch_norm else []
            layers += [ACTIVATIONS[activation](), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
