"""What features select: the classes of the samples that they let through (thesis, section 5.5.4).

N: samples; C: features; k: classes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.probes.representation import check_samples

__all__ = ["THRESHOLDS", "SelectionEntropy", "Selections", "entropy_bits", "selection_entropy"]

THRESHOLDS = {
    "relu": 0.0, "relu6": 0.0, "leaky_relu": 0.0, "elu": 0.0, "selu": 0.0, "gelu": 0.0, "silu": 0.0, "tanh": 0.0,
    "linear": 0.0, "sigmoid": 0.5, "hardsigmoid": 0.5, "softplus": math.log(2),
}  # fmt: skip
"""What each activation gives for 0: above it lies the half-space that a feature's weights point to."""

_SPATIAL = ("positions", "max")


class SelectionEntropy(NamedTuple):
    """Attributes
    ----------
    mean : float
        Mean over the features that select anything, in bits; NaN if none does.
    by_feature : Tensor
        (C,): entropy of the classes in each feature's selection, in bits; NaN where it selects nothing.
    empty : float
        Share of the features that select nothing.
    """

    mean: float
    by_feature: Tensor
    empty: float


def entropy_bits(counts: Tensor) -> Tensor:
    """Shannon entropy, in bits, of the distributions that counts (..., k) make over their last axis; NaN where all are 0."""
    share = counts.double() / counts.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1) / math.log(2)


def threshold_of(threshold: float | str) -> float:
    """The number, or the named activation's."""
    if not isinstance(threshold, str):
        return float(threshold)
    if threshold not in THRESHOLDS:
        raise ValueError(f"threshold: expected a number or one of {', '.join(THRESHOLDS)}, got {threshold!r}")
    return THRESHOLDS[threshold]


class Selections:
    """Counts (C, k) of the classes in every feature's selection, from batches; parameters as in :func:`selection_entropy`."""

    def __init__(self, *, threshold: float | str = 0.0, spatial: str = "positions") -> None:
        if spatial not in _SPATIAL:
            raise ValueError(f"spatial: expected one of {_SPATIAL}, got {spatial!r}")
        self.threshold = threshold_of(threshold)
        self.spatial = spatial
        self.counts: Tensor | None = None

    def update(self, Z: Any, y: Any) -> None:
        """Add samples."""
        Z, y = check_samples(Z, y)
        if Z.dim() > 2:
            at = Z.flatten(1, -2).transpose(1, 2) if Z.dim() == 3 else Z.flatten(2)  # (N, C, positions)
            at = at.amax(2, keepdim=True) if self.spatial == "max" else at
        else:
            at = Z[:, :, None]
        selected = torch.gt(at, self.threshold).sum(2)
        counts = (selected.double().T @ F.one_hot(y).double()).long()  # exact up to 2^53
        if self.counts is None:
            self.counts = counts
            return
        if len(counts) != len(self.counts):
            raise ValueError(f"Z: expected {len(self.counts)} features as before, got {len(counts)}")
        width = max(counts.shape[1], self.counts.shape[1])
        self.counts, counts = (F.pad(c, (0, width - c.shape[1])) for c in (self.counts, counts))
        self.counts = self.counts + counts

    def entropy(self) -> SelectionEntropy:
        if self.counts is None:
            raise ValueError("no samples: call update first")
        by_feature = entropy_bits(self.counts)
        empty = by_feature.isnan()
        mean = float(by_feature[~empty].mean()) if not empty.all() else math.nan
        return SelectionEntropy(mean, by_feature, float(empty.double().mean()))


def selection_entropy(Z: Any, y: Any, *, threshold: float | str = 0.0, spatial: str = "positions") -> SelectionEntropy:
    """Layer-wise conditional entropy H(Y|Z): how mixed the classes are that a layer's features select (figure 5.21).

    The selection of a feature holds the samples whose activation exceeds a threshold; the entropy of its classes, in bits, is
    averaged over the layer's features, without weights, as in the thesis. A feature that selects nothing, a dead unit, has no
    entropy and is left out; how many there are is told.

    Parameters
    ----------
    Z : array (N, C), (N, T, C) or (N, C, H, W)
        Representation of the samples, behind the activation.
    y : array (N,)
        Class numbers from 0.
    threshold : float or str, default=0.0
        A number, or an activation's name in :data:`THRESHOLDS`: what it gives for 0. For ReLU that is where its flat region
        ends, the thesis's definition. The others have no flat region (leaky ReLU, ELU, GELU, SiLU, linear) or two
        (sigmoid, tanh, ReLU6): for them too the selection is the half-space of positive correlation (section 5.5.2). 0 fits all
        but sigmoid (0.5) and softplus (log 2), which are positive everywhere.
    spatial : {"positions", "max"}, default="positions"
        Of images and tokens a feature is a channel, whose weights are the same at all positions. "positions": every position
        is an observation of its own with its sample's label. "max": a sample is selected where its largest position is.
    """
    selections = Selections(threshold=threshold, spatial=spatial)
    selections.update(Z, y)
    return selections.entropy()
