"""Which way is soonest: raw, bf16 or coded. Measured as training goes, and agreed upon by all ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

__all__ = ["MODES", "Choice"]

MODES = ("raw", "bf16", "coded")
TRIED = 4  # steps that a way is tried for, the first of which does not count
TRIALS_SHARE = 0.01  # part of the time that trying the other ways again may take
BETWEEN_TRIALS = 200  # steps, at least


class Choice:
    """The way for every iteration.

    A trial takes raw, bf16 and coded for a few steps each; coded only if this machine codes in less time than raw
    takes to be sent. The soonest is kept until the next trial, which is the later the more a trial costs.

    Parameters
    ----------
    start : int
        The first iteration that may be anything but raw.
    agree : callable
        Takes a list of seconds and returns the largest of all ranks, one by one: a collective operation.
    predict : callable
        Seconds that coding takes at least, on this rank.
    decisions : list of (int, str)
        (first iteration, way) of an earlier run, which are followed up to `until`; later ones are appended.
    until : float, default 0
        The first iteration that is decided anew; infinity for none.
    """

    def __init__(
        self,
        start: int,
        agree: Callable[[Sequence[float]], list[float]],
        predict: Callable[[], float],
        decisions: list[tuple[int, str]],
        until: float = 0.0,
    ) -> None:
        self._agree, self._predict, self.decisions = agree, predict, decisions
        self._next_trial = max(start, until)
        self._until = until
        self._ahead: list[str] = []  # of the trial that is under way
        self._seconds: dict[str, list[float]] = {}  # in this trial, by way
        self._kept = "raw"

    @property
    def measures(self) -> bool:
        """Whether a trial is under way, which wants to know what iterations take."""
        return bool(self._seconds)

    def mode_of(self, iteration: int) -> str:
        """To be called once for every iteration, in order, when what came before is done."""
        if iteration < self._until:
            return next((mode for first, mode in reversed(self.decisions) if first <= iteration), "raw")
        mode = self._decide(iteration)
        if not self.decisions or self.decisions[-1][1] != mode:
            self.decisions.append((iteration, mode))
        return mode

    def took(self, mode: str, seconds: float) -> None:
        """What the last iteration took."""
        if mode in self._seconds:
            self._seconds[mode].append(seconds)

    def _decide(self, iteration: int) -> str:
        if self._ahead:
            return self._ahead.pop(0)
        if self._seconds:  # a trial, or its first part, is done
            if "bf16" not in self._seconds:
                raw, coding = self._agree([_middle(self._seconds["raw"]), self._predict()])
                return self._try("bf16", *(("coded",) if coding < raw else ()))
            seconds = dict(zip(self._seconds, self._agree([_middle(s) for s in self._seconds.values()]), strict=True))
            self._seconds = {}
            self._kept = min(seconds, key=lambda mode: seconds[mode])
            best = seconds[self._kept]
            lost = TRIED * sum(s - best for s in seconds.values())
            self._next_trial = iteration + max(BETWEEN_TRIALS, math.ceil(lost / max(1e-9, TRIALS_SHARE * best)))
        elif iteration >= self._next_trial:
            return self._try("raw")
        return self._kept

    def _try(self, *modes: str) -> str:
        self._seconds |= {mode: [] for mode in modes}
        self._ahead = [mode for mode in modes for _ in range(TRIED)]
        return self._ahead.pop(0)


def _middle(seconds: list[float]) -> float:
    return statistics.median(seconds[1:])
