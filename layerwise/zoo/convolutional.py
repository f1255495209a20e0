"""Convolutional networks without shortcuts: SimCNN, the VGG family, a vanilla CNN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.heads import HeadSpec, LinearHead
from layerwise.zoo.layers import Activation, SpaceToDepth, check_sizes, conv_layer, linear_layer, scaled

__all__ = ["CNN4", "VGG", "SimCNN"]


class SimCNN(nn.Module):
    """Equal 3 x 3 convolutions with invertible downsampling (Belilovsky et al. 2019, equation 1).

    Layer j = 0, ..., J - 1 is a convolution with bias and an activation. A layer that downsamples applies
    :class:`SpaceToDepth` to its input first and has twice the channels of the layer before.

    Parameters
    ----------
    layers : int, default=5
        Their number, J.
    channels : int, default=256
        M, of the first layer.
    downsample : sequence of int, default=(2, 3)
        Layers that downsample; counted from 0, as equation 1 does and the public code.
    downsample_input : bool, default=False
        Whether the image is downsampled before the first layer, as on ImageNet.
    head : HeadSpec, default=LinearHead()
        The final auxiliary network, which belongs to the last unit: ``ConvHead(k=3, width=256)`` for k = 3.
    batch_norm : bool, default=False
        Batch normalisation after each convolution; the paper has none.
    in_channels, classes, image_size : int, default=3, 10, 32
        Of the data.
    width : float, default=1.0
        Factor on `channels`.
    dropout : float, default=0.0
        After each activation, of channels.
    activation : default="relu"
        A name or a callable that makes a module.
    """

    def __init__(
        self,
        *,
        layers: int = 5,
        channels: int = 256,
        downsample: Sequence[int] = (2, 3),
        downsample_input: bool = False,
        head: HeadSpec = LinearHead(pool=2),  # noqa: B008 - frozen
        batch_norm: bool = False,
        in_channels: int = 3,
        classes: int = 10,
        image_size: int = 32,
        width: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, classes=classes, image_size=image_size, width=width, dropout=dropout)
        if layers < 1 or not set(downsample) <= set(range(layers)):
            raise ValueError(f"downsample: expected layers from 0 to {layers - 1}, got {tuple(downsample)}")
        times = len(set(downsample)) + downsample_input
        if image_size % 2**times:
            raise ValueError(f"image_size: {times} downsamplings need a multiple of {2**times}, got {image_size}")
        self.downsample_input = SpaceToDepth() if downsample_input else nn.Identity()
        entering, leaving = in_channels * (4 if downsample_input else 1), scaled(channels, width)
        self.layers = nn.Sequential()
        for j in range(layers):
            if j in downsample and j > 0:
                leaving *= 2
            self.layers.append(
                conv_layer(
                    entering,
                    leaving,
                    batch_norm=batch_norm,
                    activation=activation,
                    dropout=dropout,
                    downsample=j in downsample,
                )
            )
            entering = leaving
        self.classifier = head.build(torch.empty(2, leaving, image_size >> times, image_size >> times), classes)

    @property
    def unit_names(self) -> list[str]:
        """A unit for each layer; the last ends with the classifier."""
        return [f"layers.{j}" for j in range(len(self.layers))]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(self.downsample_input(x)))


class VGG(nn.Module):
    """Groups of 3 x 3 convolutions, each followed by max-pooling (Simonyan and Zisserman; Ma et al., tables I and II).

    Parameters
    ----------
    hierarchy : sequence of int
        Convolutions in each group: [1, 1, 2, 2, 2] is VGG-11.
    channels : sequence of int, default=(64, 128, 256, 512, 512)
        Of each group.
    widen_early : bool, default=False
        Whether the last convolution of a group has the channels of the next, as in the PredSim code's wide variants.
    hidden : sequence of int, default=(1024,)
        Fully connected layers before the classifier: one of 1024 in the PredSim code; (4096, 4096), with the classifier the
        "three affine layers" of the thesis's VGG-13.
    hidden_dropout : float, optional
        After those; None means `dropout`.
    batch_norm : bool, default=True
        Batch normalisation after each layer.
    in_channels, classes, image_size : int, default=3, 10, 32
        Of the data. A map of a single pixel is not pooled further, so that five groups take images of 28 x 28.
    width : float, default=1.0
        Factor on `channels`, not on `hidden`, as in the PredSim code.
    dropout : float, default=0.0
        After each activation; of channels in the convolutional layers.
    activation : default="relu"
        A name or a callable that makes a module; "leaky_relu" (slope 0.01) in PredSim's settings.
    """

    def __init__(
        self,
        hierarchy: Sequence[int],
        *,
        channels: Sequence[int] = (64, 128, 256, 512, 512),
        widen_early: bool = False,
        hidden: Sequence[int] = (1024,),
        hidden_dropout: float | None = None,
        batch_norm: bool = True,
        in_channels: int = 3,
        classes: int = 10,
        image_size: int = 32,
        width: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, classes=classes, image_size=image_size, width=width, dropout=dropout)
        if len(hierarchy) != len(channels) or min(hierarchy, default=0) < 1:
            raise ValueError(
                f"hierarchy: expected {len(channels)} numbers of at least 1, one for each of channels={tuple(channels)}, got "
                f"{list(hierarchy)}"
            )
        entering, size = in_channels, image_size
        self.features = nn.Sequential()
        for group, convolutions in enumerate(hierarchy):
            for i in range(convolutions):
                wider = widen_early and i == convolutions - 1 and group + 1 < len(channels)
                leaving = scaled(channels[group + wider], width)
                layer = conv_layer(entering, leaving, batch_norm=batch_norm, activation=activation, dropout=dropout)
                self.features.append(layer)
                entering = leaving
            if size > 1:
                self.features.append(nn.MaxPool2d(2))
                size //= 2
        self.classifier = nn.Sequential(nn.Flatten())
        entering *= size * size
        for leaving in hidden:
            rate = dropout if hidden_dropout is None else hidden_dropout
            layer = linear_layer(entering, leaving, batch_norm=batch_norm, activation=activation, dropout=rate)
            self.classifier.append(layer)
            entering = leaving
        self.classifier.append(nn.Linear(entering, classes))

    @property
    def unit_names(self) -> list[str]:
        """A unit for each layer; that of the first fully connected one begins with the flattening of the image."""
        convolutions = [f"features.{i}" for i, m in enumerate(self.features) if isinstance(m, nn.Sequential)]
        hidden = range(1, len(self.classifier) - 1)
        return convolutions + [f"classifier.{0 if i == 1 else i}" for i in hidden]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class CNN4(VGG):
    """A vanilla network of four convolutions and one affine layer (thesis, section 6.4, which does not give its sizes).

    A :class:`VGG` of two groups of two convolutions with 32 and 64 channels, and without hidden fully connected layers.
    """

    def __init__(
        self, hierarchy: Sequence[int] = (2, 2), *, channels: Sequence[int] = (32, 64), **options: Any
    ) -> None:
        super().__init__(hierarchy, channels=channels, **{"hidden": (), **options})
