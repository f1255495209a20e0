"""How well a classifier trained on a representation does: linear and CNN-p separability (Belilovsky et al., section 4.2).

Both are fitted to samples and scored on others, which the caller sets aside; nothing is chosen by the latter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from layerwise.heads import ConvHead
from layerwise.probes.representation import as_features, check_samples

__all__ = ["Separability", "cnn_separability", "linear_separability"]


class Separability(NamedTuple):
    """Accuracies, from 0 to 1, on the samples that the classifier was fitted to and on the others."""

    train: float
    test: float


def _check_split(Z: Any, y: Any, Z_test: Any, y_test: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    Z, y = check_samples(Z, y)
    Z_test, y_test = check_samples(Z_test, y_test)
    if Z.shape[1:] != Z_test.shape[1:]:
        raise ValueError(f"Z_test: expected samples shaped {tuple(Z.shape[1:])} as in Z, got {tuple(Z_test.shape[1:])}")
    if not (y != y[0]).any():
        raise ValueError(f"y: expected at least two classes, got {int(y[0])} alone")
    return Z, y, Z_test.to(Z.device), y_test.to(Z.device)


def linear_separability(
    Z: Any,
    y: Any,
    Z_test: Any,
    y_test: Any,
    *,
    pool: int | None = 2,
    multi_class: str = "multinomial",
    C: float = 1.0,
    max_iter: int = 1000,
) -> Separability:
    """Accuracy of logistic regression on a representation.

    Parameters
    ----------
    Z, Z_test : array (N, C), (N, T, C) or (N, C, H, W)
        Representations of the samples to fit and to score.
    y, y_test : array (N,)
        Class numbers from 0.
    pool : int or None, default=2
        Images are averaged over a grid of so many cells a side, as in the paper; tokens over all; None flattens.
    multi_class : {"multinomial", "one_vs_rest"}, default="multinomial"
        One model of all classes, or, as in the paper, one of each class against the others.
    C : float, default=1.0
        Inverse of the penalty on squared weights, as in scikit-learn. Features are standardised first. The paper gives none.
    max_iter : int, default=1000
        Of L-BFGS. Where it does not suffice, scikit-learn's ``ConvergenceWarning`` passes through.
    """
    if multi_class not in ("multinomial", "one_vs_rest"):
        raise ValueError(f"multi_class: expected 'multinomial' or 'one_vs_rest', got {multi_class!r}")
    Z, y, Z_test, y_test = _check_split(Z, y, Z_test, y_test)
    X, X_test = (as_features(part, pool).double().cpu().numpy() for part in (Z, Z_test))
    model = LogisticRegression(C=C, max_iter=max_iter)
    fitted = make_pipeline(StandardScaler(), model if multi_class == "multinomial" else OneVsRestClassifier(model))
    fitted.fit(X, y.cpu().numpy())
    return Separability(*(float(np.mean(fitted.predict(x) == t.cpu().numpy())) for x, t in ((X, y), (X_test, y_test))))


def cnn_separability(
    Z: Any,
    y: Any,
    Z_test: Any,
    y_test: Any,
    *,
    p: int = 1,
    width: int = 256,
    epochs: int = 20,
    batch_size: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Separability:
    """Accuracy of a network of p hidden layers trained on a representation: CNN-p separability.

    The network is :class:`~layerwise.ConvHead` with k = p + 1: p times 3 x 3 convolution, batch normalisation and ReLU, then
    an average over 2 x 2 cells and a linear classifier; of features and tokens, p fully connected layers in their place.
    It is trained by Adam with a learning rate that falls to 0 along a cosine, on channels standardised over the samples,
    and scored after the last epoch. The paper gives p = 1, 2 and a width of 256, but not how it trains; where training
    accuracies all reach 100 %, as in its figure 3, test accuracies alone tell layers apart.

    Parameters
    ----------
    Z, y, Z_test, y_test
        As in :func:`linear_separability`. Training runs on Z's device.
    p : int, default=1
        Hidden layers.
    width : int, default=256
        Their channels.
    epochs, batch_size, lr, weight_decay
        Of Adam.
    seed : int, default=0
        Of the first weights and the order of samples. Global random generators are left as they are.
    """
    Z, y, Z_test, y_test = _check_split(Z, y, Z_test, y_test)
    if p < 1 or epochs < 1 or batch_size < 2:
        raise ValueError(
            f"expected p and epochs of at least 1 and batch_size of at least 2, got {p}, {epochs}, {batch_size}"
        )
    X, X_test = _standardise(Z, Z_test)
    classes = 1 + int(max(y.max(), y_test.max()))
    steps = math.ceil(len(X) / batch_size)
    with torch.random.fork_rng([X.device] if X.is_cuda else []), torch.enable_grad():
        torch.manual_seed(seed)
        network = ConvHead(k=p + 1, width=width).build(X[:1], classes).to(X.device)
        optimizer = torch.optim.Adam(network.parameters(), lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(X)).to(X.device).tensor_split(steps):
                optimizer.zero_grad()
                F.cross_entropy(network(X[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()
    network.eval()
    return Separability(*(_accuracy(network, x, t, batch_size) for x, t in ((X, y), (X_test, y_test))))


def _standardise(Z: Tensor, Z_test: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the channels' means and standard deviations over Z, in float32."""
    over = [i for i in range(Z.dim()) if i != (2 if Z.dim() == 3 else 1)]
    std, mean = torch.std_mean(Z.float(), over, correction=0, keepdim=True)
    std = torch.where(std > 0, std, 1.0)
    return (Z - mean) / std, (Z_test - mean) / std


@torch.no_grad()
def _accuracy(network: torch.nn.Module, X: Tensor, y: Tensor, batch_size: int) -> float:
    right = sum(
        int((network(x).argmax(1) == t).sum()) for x, t in zip(X.split(batch_size), y.split(batch_size), strict=True)
    )
    return right / len(y)
