"""Noise between units, which stands in for what layers that train together do to one another (thesis, section 6.6.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Regularisation", "gradient_dropout", "gradient_noise"]


class _GradientDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, rescale: bool) -> Tensor:
        ctx.p, ctx.rescale = p, rescale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        kept = torch.empty_like(grad, dtype=torch.bool).bernoulli_(1 - ctx.p)  # a quarter of the memory of float32
        left = grad * kept
        return left.div_(1 - ctx.p) if ctx.rescale else left, None, None


class _GradientNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, std: float) -> Tensor:
        ctx.std = std
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad + torch.randn_like(grad) * (ctx.std * grad.detach().square().mean().sqrt()), None


def gradient_dropout(x: Tensor, p: float, rescale: bool = True) -> Tensor:
    """`x` itself; of its gradient, every element is set to 0 with probability `p`, the others divided by 1 - p if
    `rescale`."""
    return _GradientDropout.apply(x, p, rescale) if p > 0 else x


def gradient_noise(x: Tensor, std: float) -> Tensor:
    """`x` itself; to its gradient, Gaussian noise is added of `std` times the gradient's root mean square."""
    return _GradientNoise.apply(x, std) if std > 0 else x


@dataclass(frozen=True)
class Regularisation:
    """Noise on what enters a unit and on the gradient that its head sends back.

    Attributes
    ----------
    input_dropout : float
        Probability at which an element of the unit's input is 0 in its first epoch. The model's own input is spared.
    input_decay : float
        Factor of that probability from one epoch of the unit to the next (0.95 in table 6.3).
    channelwise : bool
        Whether whole channels of images, volumes and sequences (B, C, L) are dropped.
    gradient_dropout : float
        Probability at which an element of the gradient from head to unit is 0; the head's own gradients are spared. A window
        that ends with the model's own output has no head, and no noise on its gradient.
    rescale_gradient : bool
        Whether the rest of that gradient is divided by 1 - p. The thesis does not say; with SGD, to divide was better in nine
        of nine pairs of runs (docs/results.md). With Adam, whose steps do not depend on the gradient's scale, the two are
        nearly the same.
    gradient_noise : float
        Gaussian noise on the same gradient, in units of its root mean square.
    """

    input_dropout: float = 0.0
    input_decay: float = 1.0
    channelwise: bool = False
    gradient_dropout: float = 0.0
    rescale_gradient: bool = True
    gradient_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("input_dropout", "gradient_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a probability from 0 to below 1, got {getattr(self, name)}")
        if self.input_decay < 0 or self.gradient_noise < 0:
            raise ValueError(f"input_decay and gradient_noise: expected numbers of at least 0, got {self}")

    @property
    def on_gradients(self) -> bool:
        """Whether :meth:`on_output` does anything."""
        return self.gradient_dropout > 0 or self.gradient_noise > 0

    def on_input(self, x: Tensor, epoch: int, axis: int | None = None) -> Tensor:
        """What the unit sees of `x`, whose channels are at `axis`, in its `epoch`-th epoch, counted from 0."""
        p = min(self.input_dropout * self.input_decay**epoch, 1.0)
        if p <= 0 or not x.is_floating_point():
            return x
        if self.channelwise and (x.dim() > 3 or (x.dim() == 3 and axis == 1)):
            channels = x if axis != -1 else x.movedim(-1, 1)
            dropped = torch.feature_dropout(channels, p, True)
            return dropped if axis != -1 else dropped.movedim(1, -1)
        return torch.native_dropout(x, p, True)[
            0
        ]  # as F.dropout, whose mask on the CPU is not boolean but as large as x

    def on_output(self, x: Tensor) -> Tensor:
        """What the head sees of the unit's output: the same, with noise on the way back."""
        return gradient_noise(gradient_dropout(x, self.gradient_dropout, self.rescale_gradient), self.gradient_noise)
