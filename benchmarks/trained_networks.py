"""The networks whose weights are compressed: the thesis's multilayer perceptron and a small convolutional one.

B: images of a batch; n: pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from bench_mnist import load_mnist
from sklearn.datasets import load_digits

HIDDEN = (392, 50)
BATCH = 100


@dataclass(frozen=True)
class Images:
    """Pixels from 0 to 1, float32 [images, n], and classes, int64 [images]."""

    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor

    @property
    def side(self) -> int:
        return round(self.x.shape[1] ** 0.5)


def load_images(data_dir: Path | None) -> tuple[str, Images]:
    """MNIST, or scikit-learn's digits (1,797 images of 8 x 8 pixels) where there is no `data_dir`."""
    if data_dir is not None:
        data = load_mnist(data_dir)
        parts, name, largest = (data.X_train, data.y_train, data.X_test, data.y_test), "MNIST", 255.0
    else:
        x, y = load_digits(return_X_y=True)
        parts, name, largest = (x[:1500], y[:1500], x[1500:], y[1500:]), "digits", 16.0
    x, y, x_test, y_test = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    return name, Images(x.float() / largest, y.long(), x_test.float() / largest, y_test.long())


@dataclass(frozen=True)
class Recipe:
    """How the perceptron is trained: tanh throughout, mean squared error against +-1 targets, momentum.

    Attributes
    ----------
    standardised : bool
        Pixels less their mean over all pixels, over their standard deviation; otherwise from 0 to 1.
    initial : {'normal', 'uniform'}
        First weights: normal of variance 1 / inputs (LeCun et al., 1998), or uniform within +-1 / sqrt(inputs).
    scale : float
        Their factor.
    rate, momentum, decay : float
        Step, momentum and weight decay of stochastic gradient descent on the mean over images and outputs.
    """

    standardised: bool = True
    initial: Literal["normal", "uniform"] = "normal"
    scale: float = 1.0
    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 0.0


RECIPES = {  # by what docs/results.md calls them
    "standardised": Recipe(),
    "standardised, decay": Recipe(decay=2e-4),
    "pixels, slow": Recipe(standardised=False, initial="uniform", rate=0.05),
    "pixels": Recipe(standardised=False, initial="uniform", rate=0.25),
    "pixels, decay": Recipe(standardised=False, initial="uniform", rate=0.25, decay=2e-5),
    "pixels, more decay": Recipe(standardised=False, initial="uniform", rate=0.1, decay=2e-4),
    "pixels, small start": Recipe(standardised=False, scale=0.28, rate=0.25),
    "pixels, large start": Recipe(standardised=False, scale=2.8, rate=0.1),
}


def make_perceptron(inputs: int, recipe: Recipe, generator: torch.Generator) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for ins, outs in itertools.pairwise((inputs, *HIDDEN, 10)):
        layer = torch.nn.Linear(ins, outs)
        size = recipe.scale * ins**-0.5
        if recipe.initial == "normal":
            torch.nn.init.normal_(layer.weight, std=size, generator=generator)
        else:
            torch.nn.init.uniform_(layer.weight, -size, size, generator=generator)
        torch.nn.init.zeros_(layer.bias)
        layers += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers)


def prepare(images: Images, recipe: Recipe) -> Images:
    """The images as the network sees them."""
    if not recipe.standardised:
        return images
    mean, std = images.x.mean(), images.x.std()
    return Images((images.x - mean) / std, images.y, (images.x_test - mean) / std, images.y_test)


def train_perceptron(
    images: Images, recipe: Recipe, epochs: int, seed: int
) -> Iterator[tuple[torch.nn.Sequential, list[float]]]:
    """The network before any training and after every epoch, with the layers' RMS of dMSE/dW over the epoch.

    It is one network: what the caller does to it between two epochs stays.
    """
    generator = torch.Generator().manual_seed(seed)
    network = make_perceptron(images.x.shape[1], recipe, generator)
    targets = torch.full((len(images.y), 10), -1.0).scatter_(1, images.y[:, None], 1.0)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.rate, momentum=recipe.momentum, weight_decay=recipe.decay
    )
    yield network, [0.0] * 3
    for _ in range(epochs):
        squares = [0.0] * 3
        batches = torch.randperm(len(images.x), generator=generator).split(BATCH)
        for batch in batches:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(network(images.x[batch]), targets[batch]).backward()
            for layer in range(3):
                squares[layer] += float(network[2 * layer].weight.grad.square().mean())
            optimizer.step()
        yield network, [(s / len(batches)) ** 0.5 for s in squares]


def make_convolutional() -> torch.nn.Sequential:
    """Three 3 x 3 convolutions of 32, 64 and 128 channels at stride 2, ReLU, mean over pixels, a linear layer."""
    layers: list[torch.nn.Module] = []
    for ins, outs in itertools.pairwise((1, 32, 64, 128)):
        layers += [torch.nn.Conv2d(ins, outs, 3, stride=2, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(128, 10))


def train_convolutional(images: Images, steps: int, seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    network = make_convolutional()
    x = images.x.view(-1, 1, images.side, images.side)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[batch]), images.y[batch]).backward()
        optimizer.step()
    return network


@torch.no_grad()
def accuracy(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return 100 * float((network(x).argmax(1) == y).double().mean())


def largest_weight(network: torch.nn.Module) -> torch.Tensor:
    return max((p.detach() for p in network.parameters()), key=torch.Tensor.numel)
