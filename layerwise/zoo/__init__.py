"""Models to train layer by layer: those of the source papers, at any width, for images of 28 x 28 or 32 x 32 pixels.

``make("resnet18", hierarchy=[1, 1, 2, 2], width=0.5, in_channels=1, image_size=28)`` makes one; ``names()`` lists them. All take
`in_channels`, `classes`, `image_size`, `width`, `dropout` and `activation`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from layerwise.heads import ConvHead
from layerwise.zoo.connected import MLP
from layerwise.zoo.convolutional import CNN4, VGG, SimCNN
from layerwise.zoo.layers import SpaceToDepth
from layerwise.zoo.residual import ResidualBlock, ResNet
from layerwise.zoo.transformer import TransformerBlock, ViT

__all__ = [
    "CNN4",
    "MLP",
    "VGG",
    "ResNet",
    "ResidualBlock",
    "SimCNN",
    "SpaceToDepth",
    "TransformerBlock",
    "ViT",
    "layer_names",
    "make",
    "names",
]

_WIDE = {"channels": (128, 256, 512, 512), "widen_early": True}

# Name: class and the options that it stands for, which others given to `make` replace.
_MODELS: Mapping[str, tuple[Callable[..., nn.Module], Mapping[str, Any]]] = {
    "simcnn1": (SimCNN, {}),
    "simcnn2": (SimCNN, {"layers": 4, "channels": 128, "downsample": (2,), "head": ConvHead(k=2, width=256)}),
    "simcnn3": (SimCNN, {"layers": 4, "channels": 128, "downsample": (2,), "head": ConvHead(k=3, width=256)}),
    "cnn4": (CNN4, {}),
    "vgg8": (VGG, {"hierarchy": (1, 1, 1, 1, 1)}),
    "vgg11": (VGG, {"hierarchy": (1, 1, 2, 2, 2)}),
    "vgg13": (VGG, {"hierarchy": (2, 2, 2, 2, 2)}),
    "vgg16": (VGG, {"hierarchy": (2, 2, 3, 3, 3)}),
    "vgg19": (VGG, {"hierarchy": (2, 2, 4, 4, 4)}),
    "vgg8b": (VGG, {"hierarchy": (2, 2, 1, 1), **_WIDE}),
    "vgg11b": (VGG, {"hierarchy": (4, 2, 2, 1), **_WIDE}),
    "resnet18": (ResNet, {"hierarchy": (2, 2, 2, 2)}),
    "resnet50": (ResNet, {"hierarchy": (3, 4, 6, 3), "bottleneck": True}),
    "mlp": (MLP, {}),
    "vit": (ViT, {}),
}


def names() -> list[str]:
    """What :func:`make` knows."""
    return list(_MODELS)


def make(name: str, **options: Any) -> nn.Module:
    """A new model.

    Parameters
    ----------
    name : str
        One of :func:`names`. "simcnn1" to "simcnn3" are the CIFAR-10 networks for heads of k - 1 = 0, 1 and 2 hidden layers
        (Belilovsky et al., sections 4.1 and 4.3), ended by such a head.
    **options
        Of its class, in place of those that the name stands for; ``hierarchy`` for other members of a family.

    Raises
    ------
    ValueError
        If there is no such model, or an option has no such value.
    TypeError
        If the model has no such option.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; there are {', '.join(_MODELS)}")
    model, defaults = _MODELS[name]
    known = inspect.signature(model).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    unknown = [] if open_ended else [option for option in options if option not in known]
    if unknown:
        raise TypeError(f"{name} has no option {unknown[0]!r}; there are {', '.join(known)}")
    return model(**{**defaults, **options})


def layer_names(model: nn.Module) -> list[str]:
    """Names by which ``split`` makes every layer a unit of its own, within residual blocks also, as PredSim trains them.

    A unit begins with the pooling or dropout that precedes its convolution or linear map, so that a head sees what comes right
    after the activation before. Projection shortcuts belong to the last layer of their block. The classifier is the last unit.

    Raises
    ------
    TypeError
        If `model` is not a convolutional, residual or fully connected network of the zoo.
    """
    if not isinstance(model, (VGG, ResNet, MLP)):
        raise TypeError(f"expected a VGG, CNN4, ResNet or MLP of the zoo, got {type(model).__name__}")
    before = (nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout, nn.Dropout2d)
    found: list[str] = []
    begin: str | None = None
    for name, module in model.named_modules():
        if isinstance(module, before):
            begin = begin or name
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and ".shortcut." not in name:
            found.append(begin or name)
            begin = None
    return found
