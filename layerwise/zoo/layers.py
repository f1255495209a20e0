"""What the models of the zoo are built of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

__all__ = ["Activation", "SpaceToDepth", "check_sizes", "conv_layer", "linear_layer", "make_activation", "scaled"]

Activation = str | Callable[[], nn.Module]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.01),
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def make_activation(activation: Activation) -> nn.Module:
    """A new activation, of a name or of a callable that makes one."""
    if callable(activation):
        return activation()
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}, or give a callable")
    return ACTIVATIONS[activation]()


def scaled(size: float, width: float) -> int:
    """A number of channels times the width factor, at least 1."""
    return max(1, round(size * width))


def check_sizes(*, in_channels: int, classes: int, image_size: int, width: float, dropout: float) -> None:
    """Raise ``ValueError`` if one of the options that all models have makes no sense."""
    for name, value in (("in_channels", in_channels), ("classes", classes), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if width <= 0:
        raise ValueError(f"width: expected a factor above 0, got {width}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability from 0 to below 1, got {dropout}")


def conv_layer(
    in_channels: int,
    out_channels: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    bias: bool = True,
    batch_norm: bool = True,
    activation: Activation = "relu",
    dropout: float = 0.0,
    downsample: bool = False,
) -> nn.Sequential:
    """Convolution that keeps the image's size (but for the stride), batch normalisation, activation, dropout of channels.

    With `downsample`, :class:`SpaceToDepth` comes first.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if downsample:
        layers["downsample"] = SpaceToDepth()
        in_channels *= 4
    layers["conv"] = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
    if batch_norm:
        layers["norm"] = nn.BatchNorm2d(out_channels)
    layers["act"] = make_activation(activation)
    if dropout > 0:
        layers["dropout"] = nn.Dropout2d(dropout)
    return nn.Sequential(layers)


def linear_layer(
    in_features: int,
    out_features: int,
    *,
    batch_norm: bool = True,
    activation: Activation = "relu",
    dropout: float = 0.0,
) -> nn.Sequential:
    """Linear map, batch normalisation, activation, dropout."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["linear"] = nn.Linear(in_features, out_features)
    if batch_norm:
        layers["norm"] = nn.BatchNorm1d(out_features)
    layers["act"] = make_activation(activation)
    if dropout > 0:
        layers["dropout"] = nn.Dropout(dropout)
    return nn.Sequential(layers)


class SpaceToDepth(nn.Module):
    """Invertible downsampling (Dinh et al., Jacobsen et al.): every 2 x 2 pixels become one of four times the channels.

    Channel (2 dh + dw) C + c of the result is channel c of the pixels (2 h + dh, 2 w + dw). ``nn.PixelUnshuffle(2)`` has the same
    values in the order (c, dh, dw).
    """

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2)
        return x.permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
