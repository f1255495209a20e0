"""What distinguishes one amplifier from another: the activation y(x) and its numbers, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["KINDS", "MAX_INPUT", "Amplifier"]

KINDS = ("exp", "pow3", "linear")  # in the order of the enum in csrc/gradamp/amplify_math.h
MAX_INPUT = 16.0
_LARGEST_MAX_INPUT = 80.0  # e^80 is finite in float32


@dataclass(frozen=True)
class Amplifier:
    """y = alpha e^x ("exp"), alpha x^3 + beta ("pow3") or x ("linear"), and the targets of class indices.

    `max_input` is where "exp" continues as a straight line; the others do not use it.

    Raises
    ------
    ValueError
        If a number is outside of the range that its formula needs.
    """

    kind: str
    alpha: float = 1.0
    beta: float = 0.0
    max_input: float = MAX_INPUT
    target_values: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected an amplifier of {', '.join(KINDS)}, got {self.kind!r}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"expected alpha > 0, got {self.alpha}")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ValueError(f"expected beta >= 0, got {self.beta}")
        if not -_LARGEST_MAX_INPUT <= self.max_input <= _LARGEST_MAX_INPUT:
            raise ValueError(f"expected max_input in [-80, 80], got {self.max_input}")
        if (
            len(self.target_values) != 2
            or len(set(self.target_values)) != 2
            or not all(math.isfinite(t) for t in self.target_values)
        ):
            raise ValueError(
                f"expected target_values (t_neg, t_pos), two different finite numbers, got {self.target_values}"
            )

    @property
    def settings(self) -> list[float]:
        """alpha, beta, max_input, t_neg, t_pos: what the ops take beside `kind`."""
        return [float(number) for number in (self.alpha, self.beta, self.max_input, *self.target_values)]

    @classmethod
    def of(cls, kind: str, settings: Sequence[float]) -> Amplifier:
        """The amplifier of these :attr:`settings`."""
        alpha, beta, max_input, t_neg, t_pos = settings
        return cls(kind, alpha, beta, max_input, (t_neg, t_pos))
