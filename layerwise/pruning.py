"""Removal of a trained unit's least important filters (Molchanov et al., as used by Belilovsky et al., section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pruning"]


@dataclass(frozen=True)
class Pruning:
    """How many filters a unit keeps, and how long its head is tuned to the rest."""

    keep: float = 0.5
    epochs: int = 20
