"""Step 4 of *train*: heads, the auxiliary networks that turn a unit's output into class scores.

A head is described by a frozen specification, which knows no sizes, and built for the output that its unit turns out to
have: images (B, C, H, W), volumes (B, C, D, H, W), tokens (B, T, C) or features (B, C). What comes in other forms the trainer
turns into one of these first (:mod:`layerwise.layouts`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from layerwise.grids import FORMS, Pool, average, average_cells, batch_norm, convolution, is_grid, pooled

__all__ = [
    "ConvHead",
    "HeadOutput",
    "HeadSpec",
    "LinearHead",
    "OwnHead",
    "PredSimHead",
    "SizedHeadSpec",
    "TokenHead",
    "build_head",
    "scores_of",
]


class HeadOutput(NamedTuple):
    """What a head with two branches returns.

    Attributes
    ----------
    scores : Tensor
        (B, classes).
    similarity : Tensor
        Features whose pairwise similarities are compared with those of the labels.
    """

    scores: Tensor
    similarity: Tensor


def scores_of(output: Any) -> Tensor:
    """The class scores in what a head returns."""
    return output.scores if isinstance(output, HeadOutput) else output


@runtime_checkable
class HeadSpec(Protocol):
    """Anything that can build a head."""

    def build(self, example: Tensor, classes: int) -> nn.Module:
        """A module that maps tensors shaped like `example` to (B, classes) scores or to :class:`HeadOutput`."""


@runtime_checkable
class SizedHeadSpec(Protocol):
    """A specification of a head whose sizes depend on where it goes."""

    def size_for(self, place: Any, sizes: dict[str, int] | None = None) -> HeadSpec:
        """A specification with fixed sizes, which its attribute ``sizes`` tells, for a :class:`~layerwise.subnet.Place`.

        `sizes` are those found before, as a checkpoint kept them; they are taken as they are.
        """


def build_head(spec: HeadSpec, example: Tensor, classes: int) -> nn.Module:
    """The head of a unit whose output looks like `example`, on its device.

    Raises
    ------
    TypeError
        If `spec` is no specification of a head.
    ValueError
        If a head of that kind does not fit.
    """
    if not isinstance(spec, HeadSpec):
        raise TypeError(f"head: expected a specification such as LinearHead(), got {type(spec).__name__}")
    if classes < 1:
        raise ValueError(f"classes: expected a positive number, got {classes}")
    with example.device:
        head = spec.build(example, classes)
    elsewhere = any(t.device != example.device for t in (*head.parameters(), *head.buffers()))
    return head.to(example.device) if elsewhere else head


def _features(example: Tensor, kind: str) -> int:
    if example.dim() != 2:
        raise ValueError(f"{kind}: expected {FORMS}, got {tuple(example.shape)}")
    return example.shape[1]


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier; of images, after averaging over a grid (k = 1 of Belilovsky et al., section 3.1); of tokens (B, T, C),
    after layer normalisation, on their mean.

    Attributes
    ----------
    pool : int
        Side of the grid.
    zero_init : bool
        Whether its weights begin as 0.
    batch_norm : bool
        Batch normalisation of what it classifies.
    """

    pool: int = 2
    zero_init: bool = False
    batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError(f"LinearHead: expected a pool of at least 1, got {self}")

    def build(self, example: Tensor, classes: int) -> nn.Module:
        layers: list[nn.Module] = []
        if example.dim() == 3:
            features = example.shape[2]
            layers += [nn.LayerNorm(features), _Tokens("mean")]
        elif is_grid(example):
            layers += [Pool(self.pool), nn.Flatten()]
            features = example.shape[1] * pooled(example.shape[2:], self.pool)
        else:
            features = _features(example, "LinearHead")
        if self.batch_norm:
            layers.append(nn.BatchNorm1d(features))
        return nn.Sequential(*layers, _linear(features, classes, self.zero_init))


def _linear(features: int, classes: int, zero_init: bool) -> nn.Linear:
    linear = nn.Linear(features, classes)
    if zero_init:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear


@dataclass(frozen=True)
class ConvHead:
    """k - 1 convolutions, an average over a grid and a linear classifier (equation 2 of Belilovsky et al.).

    On features (B, C), linear layers take the place of the convolutions. On tokens (B, T, C) the head is a
    ``TokenHead(hidden=k - 1, width=width)``, and the other attributes do not count.

    Attributes
    ----------
    k : int
        Hidden layers of the subnet that the head makes with its unit's layer: 1 is :class:`LinearHead`.
    width : int or None
        Channels of the convolutions; None means the unit's.
    batch_norm : bool
        Batch normalisation after each convolution, and before the classifier; off in the paper for k = 1.
    pool : int
        Side of the grid.
    downsample : int
        What the image's side is divided by, by averaging, before the convolutions.
    padding : bool
        Whether convolutions keep the image's size. Without, as in the paper's VGG heads, two pixels a side are lost.
    """

    k: int = 2
    width: int | None = None
    batch_norm: bool = True
    pool: int = 2
    downsample: int = 1
    padding: bool = True

    def __post_init__(self) -> None:
        if self.k < 1 or self.downsample < 1 or self.pool < 1 or (self.width is not None and self.width < 1):
            raise ValueError(f"ConvHead: expected k, width, pool and downsample of at least 1, got {self}")

    def build(self, example: Tensor, classes: int) -> nn.Module:
        normed = self.batch_norm and self.k > 1
        if example.dim() == 3:
            return TokenHead(hidden=self.k - 1, width=self.width).build(example, classes)
        layers: list[nn.Module] = []
        if is_grid(example):
            c, sides = example.shape[1], list(example.shape[2:])
            width = self.width or c
            if self.downsample > 1:
                sides = [math.ceil(side / self.downsample) for side in sides]
                layers.append(average(sides))
            for i in range(self.k - 1):
                layer, sides = convolution(width if i else c, width, sides, padding=self.padding, bias=not normed)
                layers.append(layer)
                layers += [batch_norm(width, sides)] if normed else []
                layers.append(nn.ReLU())
            if min(sides) < 1:
                raise ValueError(
                    f"ConvHead: {self.k - 1} unpadded convolutions do not fit an image of {tuple(example.shape[2:])}"
                )
            layers += [Pool(self.pool), nn.Flatten()]
            features = (width if self.k > 1 else c) * pooled(sides, self.pool)
        else:
            features = _features(example, "ConvHead")
            width = self.width or features
            for i in range(self.k - 1):
                layers.append(nn.Linear(width if i else features, width, bias=not normed))
                layers += [nn.BatchNorm1d(width)] if normed else []
                layers.append(nn.ReLU())
            features = width if self.k > 1 else features
        if normed:
            layers.append(nn.BatchNorm1d(features))
        return nn.Sequential(*layers, nn.Linear(features, classes))


class _Tokens(nn.Module):
    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "cls":
            return x[:, 0]
        if self.pool == "mean":
            return x.mean(1)
        return torch.cat([x[:, 0], x[:, 1:].mean(1)], 1)

    def extra_repr(self) -> str:
        return repr(self.pool)


@dataclass(frozen=True)
class TokenHead:
    """Layer normalisation, one vector of all tokens (B, T, C), hidden layers and a linear classifier.

    Attributes
    ----------
    pool : {"mean", "cls", "both"}
        The tokens' mean, the first token, or the first beside the others' mean.
    hidden : int
        Hidden layers with GELU.
    width : int or None
        Of the hidden layers; None means the tokens'.
    """

    pool: str = "mean"
    hidden: int = 0
    width: int | None = None

    def __post_init__(self) -> None:
        if self.pool not in ("mean", "cls", "both"):
            raise ValueError(f"TokenHead: expected pool 'mean', 'cls' or 'both', got {self.pool!r}")
        if self.hidden < 0 or (self.width is not None and self.width < 1):
            raise ValueError(f"TokenHead: expected hidden of at least 0 and a positive width, got {self}")

    def build(self, example: Tensor, classes: int) -> nn.Module:
        if example.dim() != 3:
            raise ValueError(f"TokenHead: expected tokens (B, T, C), got {tuple(example.shape)}")
        channels = example.shape[2]
        features = channels * (2 if self.pool == "both" else 1)
        layers: list[nn.Module] = [nn.LayerNorm(channels), _Tokens(self.pool)]
        for _ in range(self.hidden):
            layers += [nn.Linear(features, self.width or channels), nn.GELU()]
            features = self.width or channels
        return nn.Sequential(*layers, nn.Linear(features, classes))


class _PredSim(nn.Module):
    def __init__(self, similarity: nn.Module, pool: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.similarity = similarity
        self.pool = pool
        self.classifier = classifier

    def forward(self, x: Tensor) -> HeadOutput:
        return HeadOutput(self.classifier(self.pool(x).flatten(1)), self.similarity(x))


def _whole(side: int, cell: int) -> int:
    return math.ceil(side / cell)


@dataclass(frozen=True)
class PredSimHead:
    """Two branches: class scores, and features for similarity matching (Nokland and Eidnes; "predsim" of Ma et al.).

    Of images: a 3 x 3 convolution that keeps the channels gives the similarity branch; the scores come from a linear
    layer, 0 at first, on averages over cells that double in height and width by turns (in volumes: and depth) until they are few
    enough. Of features: a square linear layer and a linear layer. Neither similarity branch has a bias.

    Attributes
    ----------
    max_features : int
        Most features that the classifier may see.
    """

    max_features: int = 4096

    def __post_init__(self) -> None:
        if self.max_features < 1:
            raise ValueError(f"PredSimHead: expected positive max_features, got {self}")

    def build(self, example: Tensor, classes: int) -> nn.Module:
        if is_grid(example):
            c, sides = example.shape[1], list(example.shape[2:])
            if c > self.max_features:
                raise ValueError(f"PredSimHead: {c} channels exceed max_features={self.max_features}")
            cell = [1] * len(sides)
            longer = [axis for axis, side in enumerate(sides) if side > 1]
            turn = 0
            while c * math.prod(map(_whole, sides, cell)) > self.max_features:
                cell[longer[turn % len(longer)]] *= 2
                turn += 1
            pool: nn.Module = nn.Identity() if turn == 0 else average_cells(list(map(min, sides, cell)))
            similarity: nn.Module = convolution(c, c, sides)[0]
            return _PredSim(similarity, pool, _linear(c * math.prod(map(_whole, sides, cell)), classes, True))
        if example.dim() == 3:
            features = example.shape[2]
            similarity = nn.Linear(features, features, bias=False)
            return _PredSim(similarity, _Tokens("mean"), _linear(features, classes, True))
        features = _features(example, "PredSimHead")
        return _PredSim(nn.Linear(features, features, bias=False), nn.Identity(), _linear(features, classes, True))


@dataclass(frozen=True)
class OwnHead:
    """No head: the unit's output is the scores. For a last unit that ends with the model's classifier."""

    def build(self, example: Tensor, classes: int) -> nn.Module:
        if example.dim() != 2 or example.shape[1] != classes:
            raise ValueError(f"OwnHead: expected scores (B, {classes}) from the unit, got {tuple(example.shape)}")
        return nn.Identity()
