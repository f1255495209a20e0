"""What is trained when: a schedule is a list of stages, data that can be printed, edited, saved and compared.

A *window* (first, last) is a run of units that train together, as one subnet with one head on the last. A *stage* trains its
windows for some epochs; one pass over the data serves them all, from the bottom up, and no gradient passes between them. A
window that comes up again goes on with the head and the optimiser that it had.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

__all__ = ["Schedule", "Stage", "bottom_up", "check_schedule", "robin", "simultaneous", "sliding_windows", "whole"]

Window = tuple[int, int]

FEEDS = ("frozen", "cached")


@dataclass(frozen=True)
class Stage:
    """Windows that train together for some epochs.

    Attributes
    ----------
    windows : tuple of (int, int)
        First and last unit of each, ascending, without overlap.
    epochs : int
        Passes over the data.
    feed : {"frozen", "cached"}
        How the units below and between the windows pass data on: "frozen" runs them, in eval mode and without a graph;
        "cached" keeps what they gave in the trainer's feature cache, where that is right, and otherwise runs them. A window
        always gets what the window right below it has just computed, detached.
    round : int
        Which round of a robin schedule this is, for tables.
    """

    windows: tuple[Window, ...]
    epochs: int
    feed: str = "frozen"
    round: int = 0

    def __post_init__(self) -> None:
        if not self.windows:
            raise ValueError("a stage needs a window to train")
        if not isinstance(self.epochs, Integral) or self.epochs < 1:
            raise ValueError(f"epochs: expected a whole number of at least 1, got {self.epochs}")
        if self.feed not in FEEDS:
            raise ValueError(f"feed: expected one of {FEEDS}, got {self.feed!r}")
        below = -1
        for first, last in self.windows:
            if first > last or first <= below:
                raise ValueError(f"windows: expected ascending (first, last) without overlap, got {self.windows}")
            below = last


Schedule = list[Stage]
Epochs = int | Sequence[int] | Callable[[int], int]


def _epochs_of(epochs: Epochs, index: int) -> int:
    if callable(epochs):
        return max(1, round(epochs(index)))
    if not isinstance(epochs, Sequence):
        return epochs  # a stage checks it
    return epochs[min(index, len(epochs) - 1)]


def bottom_up(units: int, epochs: Epochs, *, feed: str = "frozen") -> Schedule:
    """One unit after the other (algorithm 3 of the thesis; algorithm 1 of Belilovsky et al.).

    `epochs` is a number, one per unit (the last for all further ones), or a function of the unit's number.
    """
    return [Stage(((i, i),), _epochs_of(epochs, i), feed) for i in range(units)]


def sliding_windows(units: int, epochs: Epochs, *, size: int, overlap: int = 0, feed: str = "frozen") -> Schedule:
    """Segments of `size` units, each sharing `overlap` units with the one before (thesis, section 6.5).

    Raises
    ------
    ValueError
        Unless 0 <= overlap < size.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"sliding_windows: expected 0 <= overlap < size, got size={size}, overlap={overlap}")
    stages: Schedule = []
    first = 0
    while True:
        last = min(first + size, units) - 1
        stages.append(Stage(((first, last),), _epochs_of(epochs, len(stages)), feed))
        if last == units - 1:
            return stages
        first += size - overlap


def whole(units: int, epochs: int) -> Schedule:
    """All units as one window: backpropagation end to end."""
    return [Stage(((0, units - 1),), epochs)]


def simultaneous(units: int, epochs: int) -> Schedule:
    """All units at once, each on what the one below has just computed (local errors)."""
    return [Stage(tuple((i, i) for i in range(units)), epochs)]


def robin(
    units: int, rounds: int, epochs: int = 1, *, shuffle: bool = False, seed: int = 0, feed: str = "frozen"
) -> Schedule:
    """Rounds in which each unit trains a few epochs, in order or, with `shuffle`, in a new random order every round (algorithm
    4 of the thesis)."""
    order = list(range(units))
    generator = random.Random(seed)
    stages = []
    for r in range(rounds):
        if shuffle:
            generator.shuffle(order)
        stages += [Stage(((i, i),), epochs, feed, r) for i in order]
    return stages


def check_schedule(schedule: Sequence[Stage], units: int) -> None:
    """Raise ``ValueError`` unless there is a stage and every window lies within the chain."""
    if not schedule:
        raise ValueError("the schedule is empty")
    for stage in schedule:
        for first, last in stage.windows:
            if first < 0 or last >= units:
                raise ValueError(f"window {(first, last)} of a chain of {units} units")
