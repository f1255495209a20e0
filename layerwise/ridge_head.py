"""A head in closed form: ridge regression of one-hot labels on pooled features, solved again as the unit changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.grids import FORMS, Pool, is_grid, pooled
from platonic.solvers import solve_moments

__all__ = ["RidgeHead"]


class _Ridge(nn.Module):
    """Scores of features by the last solution. Gradients pass to the features; there is nothing of its own to train."""

    weight: Tensor
    bias: Tensor
    moments: Tensor
    total: Tensor

    def __init__(self, features: int, classes: int, spec: RidgeHead) -> None:
        super().__init__()
        self.spec = spec
        self.classes = classes
        self.pool = Pool(spec.pool)
        self.register_buffer("weight", torch.zeros(classes, features))
        self.register_buffer("bias", torch.zeros(classes))
        size = features + classes + 1
        self.register_buffer("moments", torch.zeros(size, size, dtype=torch.float64))  # of [features, one-hot, 1]
        self.register_buffer("total", torch.zeros(2, dtype=torch.int64))  # batches seen, batches at the last solution
        self._seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if is_grid(x):
            x = self.pool(x).flatten(1)
        elif x.dim() == 3:
            x = x.mean(1)
        if self.training:
            self._seen = x.detach()
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    @torch.no_grad()
    def observe(self, target: Tensor) -> None:
        """Add the batch that was last seen, with its labels, and solve again when it is time."""
        assert self._seen is not None, "observe follows a forward pass in training mode"
        features = self._seen.float()
        self._seen = None
        ones = torch.ones(len(features), 1, device=features.device)
        dense = target if target.is_floating_point() else F.one_hot(target, self.classes)
        if dense.shape != (len(features), self.classes):
            raise ValueError(
                f"RidgeHead: expected class numbers (N,) or numbers (N, {self.classes}) as labels, got {target.dtype} "
                f"{tuple(target.shape)}"
            )
        rows = torch.cat([features, dense.to(features.dtype), ones], 1)
        update = (rows.T @ rows).double()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(update)  # the same solution everywhere
        self.moments.mul_(1 - 1 / self.spec.memory).add_(update)
        self.total[0] += 1
        seen, solved = self.total.tolist()
        if solved == 0 or seen - solved >= self.spec.every:
            self.solve()
            self.total[1] = self.total[0]

    @torch.no_grad()
    def solve(self) -> None:
        """Weights from the moments gathered so far."""
        p = self.weight.shape[1]
        total = self.moments[-1, -1]
        mean = self.moments[-1, :-1] / total
        centred = self.moments[:-1, :-1] - torch.outer(mean, mean) * total
        zz, zy = centred[:p, :p], centred[:p, p:]
        penalty = self.spec.l2 * zz.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        solution = solve_moments(zz, penalty.expand(p), zy)
        self.weight.copy_(solution.T)
        self.bias.copy_(mean[p:] - mean[:p] @ solution)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} features, {self.classes} classes, l2={self.spec.l2}"


@dataclass(frozen=True)
class RidgeHead:
    """Minimises sum_i ||W z_i + b - onehot(y_i)||^2 + penalty ||W||^2 over the batches seen, without gradient descent.

    z are the unit's features: of images, means over a grid; of tokens, the tokens' mean. Second moments of [z, onehot(y)] are
    added up in float64 batch by batch, older ones counting less, and solved by Cholesky (:mod:`platonic`). The unit is
    trained through the scores; the loss "mse" is the one that they minimise. The head has no parameters and needs no
    optimiser.

    Attributes
    ----------
    l2 : float
        The penalty over the mean of the features' sums of squares about their means.
    every : int
        Batches between two solutions.
    memory : float
        Batches after which a batch counts 1 / e of a new one.
    pool : int
        Side of the grid.
    """

    l2: float = 1e-3
    every: int = 10
    memory: float = 100.0
    pool: int = 2

    def __post_init__(self) -> None:
        if self.l2 <= 0 or self.every < 1 or self.memory <= 1:
            raise ValueError(f"RidgeHead: expected l2 > 0, every >= 1 and memory > 1, got {self}")

    def build(self, example: Tensor, classes: int) -> nn.Module:
        if is_grid(example):
            features = example.shape[1] * pooled(example.shape[2:], self.pool)
        elif example.dim() in (2, 3):
            features = example.shape[-1]
        else:
            raise ValueError(f"RidgeHead: expected {FORMS}, got {tuple(example.shape)}")
        return _Ridge(features, classes, self)
