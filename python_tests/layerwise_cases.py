"""Small models, data and methods that the tests of layer-wise training share."""

from __future__ import annotations

from dataclasses import replace

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw


def digits(n: int = 300, flat: bool = False) -> TensorDataset:
    X, y = load_digits(return_X_y=True)
    x = torch.tensor(X[:n], dtype=torch.float32) / 16
    return TensorDataset(x if flat else x.view(-1, 1, 8, 8), torch.tensor(y[:n]))


def loader(n: int = 300, batch: int = 50, shuffle: bool = True, flat: bool = False) -> DataLoader:
    return DataLoader(digits(n, flat), batch, shuffle=shuffle)


def cnn(width: int = 6, norm: bool = True, dropout: float = 0.0, seed: int = 0) -> nn.Sequential:
    """Three convolutional units and a classifier, which joins the third."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(3):
        layers.append(nn.Conv2d(width if i else 1, width, 3, padding=1))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.ReLU())
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip((64, *widths), widths, strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear((64, *widths)[-1], 10))


ADAM = lw.OptimizerSpec("adam", 2e-3)
NOISE = lw.Regularisation(0.3, 0.9, gradient_dropout=0.4, gradient_noise=0.1)

METHODS = {
    "bottom up": lw.Method("bottom up", lambda n: lw.bottom_up(n, 2), head=lw.ConvHead(2, width=5), optimizer=ADAM),
    "greedy": lw.greedy(1, epochs=2),
    "segments": lw.Method(
        "segments", lambda n: lw.sliding_windows(n, 2, size=2, overlap=1), optimizer=ADAM, regularisation=NOISE
    ),
    "simultaneous": lw.Method(
        "simultaneous", lambda n: lw.simultaneous(n, 4), head=lw.PredSimHead(64), loss="predsim", optimizer=ADAM
    ),
    "round robin": lw.Method("round robin", lambda n: lw.robin(n, 2), optimizer=ADAM, regularisation=NOISE),
    "random robin": lw.Method("random robin", lambda n: lw.robin(n, 3, shuffle=True, seed=1), optimizer=ADAM),
    "pairs at once": lw.Method(
        "pairs at once", [lw.Stage(((0, 0), (2, 2)), 2), lw.Stage(((1, 1),), 1), lw.Stage(((0, 0), (2, 2)), 1)], optimizer=ADAM
    ),
    "ridge": lw.Method(
        "ridge", lambda n: lw.bottom_up(n, 2), head=lw.RidgeHead(every=2), loss="mse", optimizer=ADAM
    ),
    "gradamp": lw.Method("gradamp", lambda n: lw.bottom_up(n, 2), loss="pow3_ga", optimizer=ADAM),
    "pruning": lw.Method(
        "pruning", lambda n: lw.bottom_up(n, 2), head=lw.ConvHead(2), optimizer=ADAM, pruning=lw.Pruning(0.5, 1, 3)
    ),
    "best weights": replace(
        lw.Method("best weights", lambda n: lw.bottom_up(n, 3), optimizer=ADAM), stopping=lw.Stopping(2, True)
    ),
}  # fmt: skip
