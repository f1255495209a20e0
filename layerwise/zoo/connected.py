"""Multilayer perceptrons of any depth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from layerwise.zoo.layers import Activation, check_sizes, linear_layer, make_activation, scaled

__all__ = ["MLP"]

_PROBES = 1 << 16


class MLP(nn.Module):
    """Fully connected layers, without shortcuts.

    Parameters
    ----------
    depth : int, default=3
        Hidden layers.
    hidden : int, default=1024
        Features of each.
    in_features : int, optional
        Of the data; None means `in_channels` x `image_size` x `image_size`. Images are flattened.
    batch_norm : bool, default=False
        Batch normalisation before each activation.
    init : {"default", "scaled", "orthogonal"}, default="default"
        How weights begin: "default" as ``nn.Linear`` has them; "scaled" normal, with the variance for which what enters the
        activations has a variance of 1 in every layer, if the data has; "orthogonal" with that scale. The last two begin with
        biases of 0.
    in_channels, classes, image_size : int, default=3, 10, 32
        Of the data.
    width : float, default=1.0
        Factor on `hidden`.
    dropout : float, default=0.0
        After each activation.
    activation : default="relu"
        A name or a callable that makes a module.
    """

    def __init__(
        self,
        *,
        depth: int = 3,
        hidden: int = 1024,
        in_features: int | None = None,
        batch_norm: bool = False,
        init: str = "default",
        in_channels: int = 3,
        classes: int = 10,
        image_size: int = 32,
        width: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, classes=classes, image_size=image_size, width=width, dropout=dropout)
        if depth < 1 or hidden < 1 or (in_features or 1) < 1:
            raise ValueError(f"depth, hidden, in_features: expected at least 1, got {depth}, {hidden}, {in_features}")
        if init not in ("default", "scaled", "orthogonal"):
            raise ValueError(f"init: expected 'default', 'scaled' or 'orthogonal', got {init!r}")
        entering = in_features or in_channels * image_size * image_size
        leaving = scaled(hidden, width)
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential()
        for _ in range(depth):
            self.layers.append(
                linear_layer(entering, leaving, batch_norm=batch_norm, activation=activation, dropout=dropout)
            )
            entering = leaving
        self.classifier = nn.Linear(entering, classes)
        if init != "default":
            linear = [m for m in self.layers.modules() if isinstance(m, nn.Linear)]
            for layer, gain in zip(linear, [1.0] + [_gain(activation)] * (depth - 1), strict=True):
                if init == "orthogonal":
                    nn.init.orthogonal_(layer.weight, gain)
                else:
                    nn.init.normal_(layer.weight, 0, gain / math.sqrt(layer.in_features))
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(self.flatten(x)))


def _gain(activation: Activation) -> float:
    """sqrt(fan-in) times the weights' standard deviation after an activation f:
    1 / sqrt(E f(z)^2), z standard normal; sqrt(2) for ReLU."""
    z = torch.special.ndtri((torch.arange(_PROBES, dtype=torch.float64) + 0.5) / _PROBES)
    return make_activation(activation).double()(z).square().mean().rsqrt().item()
