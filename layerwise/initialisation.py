"""Weights in closed form to begin with: a unit's linear layer as a layer of a platonic network (:mod:`platonic`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.feednet import Batch, Feednet
from layerwise.schedules import Window
from layerwise.units import Unit, main_tensor
from platonic import PlatonicMLPClassifier

__all__ = ["initialise_unit", "initialise_window"]

_SAMPLES = 10_000  # from which weights are found

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "logistic",
    nn.Identity: "identity",
}


@torch.no_grad()
def initialise_unit(unit: Unit, features: Tensor, labels: Tensor, *, seed: int = 0, **options: Any) -> None:
    """Give a unit of one linear layer the weights that a platonic network of one hidden layer finds for it.

    Parameters
    ----------
    unit : Unit
        With exactly one ``nn.Linear`` and no convolution.
    features : Tensor
        (N, ...): samples that enter the unit.
    labels : Tensor
        (N,): their classes.
    seed : int, default=0
        Of the projections that are drawn.
    **options
        Of :class:`~platonic.PlatonicMLPClassifier`, such as ``projection="pairs"``.

    Raises
    ------
    ValueError
        If the unit is of another kind.
    """
    layers = [m for part in unit.parts for m in part.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    linear = layers[0] if len(layers) == 1 else None
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"unit {unit.name!r}: closed-form initialisation needs exactly one nn.Linear and no convolution; it has "
            f"{len(layers)} such layers"
        )
    kinds = [_ACTIVATIONS[type(m)] for part in unit.parts for m in part.modules() if type(m) in _ACTIVATIONS]
    X = features.flatten(1).float()
    if X.shape[1] != linear.in_features:
        raise ValueError(f"unit {unit.name!r}: {X.shape[1]} features enter a layer of {linear.in_features}")
    options.setdefault("activation", kinds[-1] if kinds else "relu")
    network = PlatonicMLPClassifier((linear.out_features,), random_state=seed, **options).fit(X, labels).to_torch()
    fitted = network[0]
    assert isinstance(fitted, nn.Linear)
    if nn.utils.parametrize.is_parametrized(linear, "weight"):
        linear.weight = fitted.weight.detach().to(linear.weight.dtype)
    elif "weight" in linear._parameters:
        linear.weight.copy_(fitted.weight)
    else:
        raise ValueError(
            f"unit {unit.name!r}: the weight of its linear layer is computed from others; set those yourself"
        )
    if linear.bias is not None:
        linear.bias.copy_(fitted.bias)


def initialise_window(feednet: Feednet, window: Window, batches: Iterable[Batch]) -> None:
    """The same for a window's units, one after the other, of batches that enter the first; the model's output layer is left
    as it is."""
    features, labels, samples = [], [], 0
    for state, target in batches:
        features.append(main_tensor(state))
        labels.append(target)
        samples += len(target)
        if samples >= _SAMPLES:
            break
    entering, target, chain = torch.cat(features), torch.cat(labels), feednet.chain
    for i in range(window[0], window[1] + 1):
        if not (chain.has_output and i == len(chain) - 1):
            initialise_unit(chain[i], entering, target)
            entering = main_tensor(feednet.advance(entering, i, i + 1))
