"""Step 5 of *train*: what a unit's head is trained for.

A local loss is a callable ``(output, target) -> scalar``, `output` being what the head returns. :func:`make_local_loss` makes
one from a name, and takes any callable of scores and labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradamp import make_loss
from gradamp.losses import LOSSES
from layerwise.heads import HeadOutput, scores_of

__all__ = ["PredSimLoss", "ScoresLoss", "make_local_loss", "similarity_matrix"]

_NORM_EPS = 1e-8

LocalLoss = Callable[[Any, Tensor], Tensor]


class ScoresLoss(nn.Module):
    """A loss of scores (B, classes) and labels, whatever else the head returns."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Any, target: Tensor) -> Tensor:
        return self.loss(scores_of(output), target)


def similarity_matrix(features: Tensor) -> Tensor:
    """Cosines between the samples of a batch, each sample centred: (B, B), from -1 to 1.

    Of images (B, C, H, W) and volumes with more than three channels and more than one position, a channel's standard deviation
    over the image stands for it; everything else is flattened.
    """
    if features.dim() > 3 and features.shape[1] > 3 and features.shape[2:].numel() > 1:
        features = features.flatten(2).std(2)
    else:
        features = features.flatten(1)
    centred = features - features.mean(1, keepdim=True)
    unit = centred / (_NORM_EPS + centred.norm(dim=1, keepdim=True))
    return (unit @ unit.T).clamp(-1, 1)


def label_similarity(target: Tensor, classes: int) -> Tensor:
    """:func:`similarity_matrix` of the labels' one-hot codes: 1 within a class, -1 / (classes - 1) between two."""
    same = target[:, None] == target[None, :]
    other = -1.0 / (classes - 1) if classes > 1 else 0.0
    return torch.where(same, 1.0, other)


class PredSimLoss(nn.Module):
    """(1 - beta) cross-entropy + beta times the mean squared difference of the similarity matrices.

    The matrices are those of the head's similarity branch and of the labels (Nokland and Eidnes, equations 3 to 5). Of a head
    without that branch, as at the model's own output, the cross-entropy alone, in the same weight.

    Parameters
    ----------
    beta : float, default=0.99
        Weight of similarity matching.
    """

    def __init__(self, beta: float = 0.99) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: expected a number from 0 to 1, got {beta}")
        self.beta = beta

    def forward(self, output: Any, target: Tensor) -> Tensor:
        if target.dim() != 1 or target.is_floating_point():
            raise ValueError(
                f"predsim: expected class numbers (N,) as labels, got {target.dtype} {tuple(target.shape)}"
            )
        scores = scores_of(output)
        loss = (1 - self.beta) * F.cross_entropy(scores, target)
        if isinstance(output, HeadOutput):
            wanted = label_similarity(target, scores.shape[1]).to(output.similarity.dtype)
            loss = loss + self.beta * F.mse_loss(similarity_matrix(output.similarity), wanted)
        return loss

    def extra_repr(self) -> str:
        return f"beta={self.beta}"


class OneHotMSELoss(nn.Module):
    """Mean squared difference of the scores and the labels' one-hot codes, or probabilities (N, classes)."""

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        dense = target if target.is_floating_point() else F.one_hot(target, scores.shape[1])
        return F.mse_loss(scores, dense.to(scores.dtype))


def make_local_loss(loss: str | Callable[[Tensor, Tensor], Tensor], **options: Any) -> nn.Module:
    """The local loss called `loss`, or made of a callable of scores and labels.

    Parameters
    ----------
    loss : str or callable
        "cross_entropy", "exp_ga", "pow3_ga", "linear_mse" (:mod:`gradamp`), "mse" (against one-hot codes), "predsim", or any
        callable; a :class:`PredSimLoss` or :class:`ScoresLoss` is taken as it is.
    **options
        Of the named loss.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if isinstance(loss, (PredSimLoss, ScoresLoss)):
        return loss
    if callable(loss):
        if options:
            raise TypeError(f"options {sorted(options)} belong to a named loss; give a callable that has them")
        return ScoresLoss(loss)
    if loss == "predsim":
        return PredSimLoss(**options)
    if loss == "cross_entropy" and not options:
        return ScoresLoss(F.cross_entropy)  # which takes half as long to call as the module
    if loss == "mse":
        return ScoresLoss(OneHotMSELoss(**options))
    if loss not in LOSSES:
        raise ValueError(
            f"unknown loss {loss!r}; there are {', '.join([*LOSSES, 'mse', 'predsim'])}, or give a callable"
        )
    return ScoresLoss(make_loss(loss, **options))
