"""Networks made of a trained chain: up to one head, or all heads as one (Belilovsky et al., section 4: sum over j of 2^j z_j)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.heads import scores_of
from layerwise.units import Chain, State, main_tensor

if TYPE_CHECKING:
    from layerwise.trainer import LayerwiseTrainer

__all__ = ["HeadEnsemble", "Truncated", "make_ensemble"]


def _state_of(inputs: tuple[Any, ...]) -> State:
    return inputs[0] if len(inputs) == 1 else inputs


class Truncated(nn.Module):
    """The first units of a chain and the head on the last of them; called with the model's inputs, one by one or as a tuple."""

    def __init__(self, chain: Chain, stop: int, head: nn.Module) -> None:
        super().__init__()
        self.units = nn.ModuleList(chain.units[:stop])
        self.head = head

    def forward(self, *inputs: Any) -> Tensor:
        state = _state_of(inputs)
        for unit in self.units:
            state = unit(state)
        return scores_of(self.head(main_tensor(state)))


class HeadEnsemble(nn.Module):
    """Weighted mean of what the heads along a chain say; called with the model's inputs, one by one or as a tuple.

    Parameters
    ----------
    units : sequence of Module
        In order.
    heads : sequence of (int, Module)
        Heads with the unit, counted from 0, that each sits on; ascending.
    weights : sequence of float, optional
        One per head; None means 1, 2, 4, ..., so that each head outweighs all before it.
    over : {"logits", "probabilities"}, default="logits"
        What is averaged: scores (the public code on CIFAR-10) or their softmax (ImageNet).

    Raises
    ------
    ValueError
        If the numbers of heads and weights differ, or `over` is something else.
    """

    weights: Tensor

    def __init__(
        self,
        units: Sequence[nn.Module],
        heads: Sequence[tuple[int, nn.Module]],
        *,
        weights: Sequence[float] | None = None,
        over: str = "logits",
    ) -> None:
        super().__init__()
        if any(a > b for (a, _), (b, _) in itertools.pairwise(heads)):
            raise ValueError(f"heads: expected an ascending order of their units, got {[unit for unit, _ in heads]}")
        if over not in ("logits", "probabilities"):
            raise ValueError(f"over: expected 'logits' or 'probabilities', got {over!r}")
        if not heads:
            raise ValueError("expected at least one head")
        raw = torch.tensor(
            [2.0 ** (j + 1 - len(heads)) for j in range(len(heads))] if weights is None else list(weights),
            dtype=torch.float64,
        )
        if len(raw) != len(heads):
            raise ValueError(f"weights: expected {len(heads)}, one per head, got {len(raw)}")
        if not bool((raw >= 0).all()) or float(raw.sum()) <= 0:
            raise ValueError("weights: expected numbers of at least 0, not all 0")
        self.over = over
        self.places = [unit for unit, _ in heads]
        self.units = nn.ModuleList(units[: self.places[-1] + 1])
        self.heads = nn.ModuleList(head for _, head in heads)
        self.register_buffer("weights", (raw / raw.sum()).float())

    def forward(self, *inputs: Any) -> Tensor:
        """(B, classes): mean scores, or mean probabilities."""
        state = _state_of(inputs)
        total: Tensor | None = None
        following = iter(zip(self.places, self.heads, self.weights, strict=True))
        place, head, weight = next(following)
        for i, unit in enumerate(self.units):
            state = unit(state)
            while i == place:
                scores = scores_of(head(main_tensor(state)))
                part = weight * (scores.softmax(1) if self.over == "probabilities" else scores)
                total = part if total is None else total + part
                place, head, weight = next(following, (-1, head, weight))
        assert total is not None
        return total


def make_ensemble(
    trainer: LayerwiseTrainer,
    *,
    units: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    over: str = "logits",
) -> HeadEnsemble:
    """The ensemble of a trainer's heads, in eval mode; of those on `units`, ascending, or of all."""
    windows = [trainer.window_of(place) for place in (trainer.heads if units is None else units)]
    heads = [(window[1], trainer.trainings[window].subnet.head) for window in windows]
    return HeadEnsemble(trainer.chain.units, heads, weights=weights, over=over).eval()
