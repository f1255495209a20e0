"""The settings of the thesis's experiments by name: a loss with the learning rate and weight decay that it was tuned with.

>>> preset = PRESETS["vgg13/exp_ga"]
>>> loss = preset.make_loss()
>>> optimizer = torch.optim.SGD(net.parameters(), preset.learning_rate, weight_decay=preset.weight_decay)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from gradamp.losses import make_loss

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """A loss and what it was trained with; `learning_rate` and `weight_decay` are None where the thesis gives none."""

    loss: str
    options: Mapping[str, Any]
    learning_rate: float | None
    weight_decay: float | None
    source: str
    error: float | None = field(default=None)  # misclassification rate in %, as reported

    def make_loss(self, **options: Any) -> nn.Module:
        """The loss; `options` (`weight`, `reduction`, ...) are added to the preset's own."""
        return make_loss(self.loss, **{**self.options, **options})


def _exp(t_pos: float, alpha: float) -> dict[str, Any]:
    return {"target_values": (0.0, t_pos), "alpha": alpha}


def _pow3(t_neg: float, t_pos: float, alpha: float, beta: float) -> dict[str, Any]:
    return {"target_values": (t_neg, t_pos), "alpha": alpha, "beta": beta}


_LINEAR = {"target_values": (-1.0, 1.0)}
_VGG = "table 4.2, CIFAR-10, median of 8 trials"
_CIFAR10 = "table 4.3, CIFAR-10"
_CIFAR100 = "table 4.4, CIFAR-100"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "vgg13/cross_entropy": Preset("cross_entropy", {}, 0.05, 0.0005, _VGG, 5.68),
        "vgg13/exp_ga": Preset("exp_ga", _exp(2, 0.5), 0.01, 0.03, _VGG, 5.61),
        "vgg13/pow3_ga": Preset("pow3_ga", _pow3(0, 2, 0.001, 0), 0.1, 0.003, _VGG, 5.55),
        "vgg13/linear_mse": Preset("linear_mse", _LINEAR, 0.01, 0.03, _VGG, 5.47),
        "vgg19/cross_entropy": Preset("cross_entropy", {}, 0.05, 0.0005, _VGG, 6.05),
        "vgg19/exp_ga": Preset("exp_ga", _exp(2, 0.5), 0.01, 0.03, _VGG, 5.82),
        "vgg19/pow3_ga": Preset("pow3_ga", _pow3(0, 2, 0.001, 0), 0.07, 0.0003, _VGG, 5.93),
        "vgg19/linear_mse": Preset("linear_mse", _LINEAR, 0.01, 0.03, _VGG, 5.79),
        "pyramidnet55-cifar10/cross_entropy": Preset("cross_entropy", {}, 0.1, 0.0001, _CIFAR10, 6.02),
        "pyramidnet55-cifar10/exp_ga": Preset("exp_ga", _exp(2, 1), 0.4, 0.0001, _CIFAR10, 5.51),
        "pyramidnet55-cifar10/pow3_ga": Preset("pow3_ga", _pow3(-1, 1, 0.0007, 0), 7.5, 0.000003, _CIFAR10, 5.66),
        "pyramidnet110-cifar10/cross_entropy": Preset("cross_entropy", {}, 0.1, 0.0001, _CIFAR10, 4.98),
        "pyramidnet110-cifar10/exp_ga": Preset("exp_ga", _exp(3, 0.5), 0.2, 0.0001, _CIFAR10, 4.67),
        "pyramidnet110-cifar10/pow3_ga": Preset("pow3_ga", _pow3(-1, 1, 0.0007, 0), 5.0, 0.000003, _CIFAR10, 4.71),
        "pyramidnet55-cifar100/cross_entropy": Preset("cross_entropy", {}, 0.5, 0.0001, _CIFAR100, 25.23),
        "pyramidnet55-cifar100/exp_ga": Preset("exp_ga", _exp(2, 1), 0.3, 0.00005, _CIFAR100, 29.17),
        "pyramidnet55-cifar100/pow3_ga": Preset("pow3_ga", _pow3(-1, 1, 0.001, 0), 20.0, 0.000001, _CIFAR100, 24.21),
        "pyramidnet110-cifar100/cross_entropy": Preset("cross_entropy", {}, 0.5, 0.0001, _CIFAR100, 21.70),
        "pyramidnet110-cifar100/exp_ga": Preset("exp_ga", _exp(2, 0.5), 0.3, 0.00005, _CIFAR100, 25.51),
        "pyramidnet110-cifar100/pow3_ga": Preset("pow3_ga", _pow3(-1, 1, 0.001, 0), 16.0, 0.000001, _CIFAR100, 21.41),
        "cnn5/exp_ga": Preset("exp_ga", _exp(16, 0.1), None, None, "section 4.5, figure 4.1a, CIFAR-10"),
        "cnn5/pow3_ga": Preset("pow3_ga", _pow3(0, 10, 0.001, 0.4), None, None, "section 4.7, figure 4.1a, CIFAR-10"),
        "cnn10/exp_ga": Preset("exp_ga", _exp(6, 0.1), None, None, "section 4.10, figure 4.1b, CIFAR-10"),
        "cnn10/pow3_ga": Preset(
            "pow3_ga", _pow3(-2, 10, 0.001, 0.4), None, None, "section 4.10, figure 4.1b, CIFAR-10"
        ),
        "cnn10/cross_entropy": Preset("cross_entropy", {}, 1.0, None, "section 4.10, figure 4.1b, CIFAR-10"),
    }
)
