"""Residual networks for small images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from layerwise.zoo.layers import Activation, check_sizes, conv_layer, make_activation, scaled

__all__ = ["ResNet", "ResidualBlock"]

_EXPANSION = 4  # channels that leave a bottleneck block, as a multiple of those inside


class ResidualBlock(nn.Module):
    """Convolutional layers and a shortcut, which is added before the last activation (He et al. 2016).

    Two 3 x 3 convolutions, or, in a bottleneck block, one of 1 x 1, one of 3 x 3 and one of 1 x 1. Where sizes differ the
    shortcut is a 1 x 1 convolution with batch normalisation.
    """

    def __init__(
        self, in_channels: int, channels: int, *, stride: int, bottleneck: bool, activation: Activation, dropout: float
    ) -> None:
        super().__init__()
        out_channels = channels * (_EXPANSION if bottleneck else 1)
        layer = partial(conv_layer, bias=False, activation=activation, dropout=dropout)
        if bottleneck:
            self.layers = nn.Sequential(
                layer(in_channels, channels, kernel=1), layer(channels, channels, stride=stride)
            )
        else:
            self.layers = nn.Sequential(layer(in_channels, channels, stride=stride))
        kernel = 1 if bottleneck else 3
        self.conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))
        self.act = make_activation(activation)
        self.dropout = nn.Dropout2d(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.layers(x)))
        return self.dropout(self.act(y + self.shortcut(x)))


class ResNet(nn.Module):
    """Residual network with a 3 x 3 stem and without max-pooling (PredSim code; Ma et al., tables III to VI).

    Parameters
    ----------
    hierarchy : sequence of int
        Residual blocks in each stage: [2, 2, 2, 2] is ResNet-18, [1, 1, 2, 2] downsamples it sooner. Every stage but the first
        halves the image and doubles the channels.
    bottleneck : bool, default=False
        Blocks of three convolutions, with four times the channels leaving them, as in ResNet-50.
    channels : int, default=64
        Of the stem and the first stage.
    in_channels, classes, image_size : int, default=3, 10, 32
        Of the data; an image of any size can be classified.
    width : float, default=1.0
        Factor on all channels.
    dropout : float, default=0.0
        Of channels, after each activation.
    activation : default="relu"
        A name or a callable that makes a module; "leaky_relu" (slope 0.01) in PredSim's settings.
    """

    def __init__(
        self,
        hierarchy: Sequence[int],
        *,
        bottleneck: bool = False,
        channels: int = 64,
        in_channels: int = 3,
        classes: int = 10,
        image_size: int = 32,
        width: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, classes=classes, image_size=image_size, width=width, dropout=dropout)
        if min(hierarchy, default=0) < 1:
            raise ValueError(f"hierarchy: expected numbers of at least 1, got {list(hierarchy)}")
        entering = scaled(channels, width)
        self.stem = conv_layer(in_channels, entering, bias=False, activation=activation, dropout=dropout)
        self.stages = nn.Sequential()
        for stage, blocks in enumerate(hierarchy):
            inner = scaled(channels * 2**stage, width)
            made = nn.Sequential()
            for i in range(blocks):
                block = ResidualBlock(
                    entering,
                    inner,
                    stride=2 if stage > 0 and i == 0 else 1,
                    bottleneck=bottleneck,
                    activation=activation,
                    dropout=dropout,
                )
                made.append(block)
                entering = inner * (_EXPANSION if bottleneck else 1)
            self.stages.append(made)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(entering, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.stages(self.stem(x))).flatten(1))
