"""Decision layers and blocks of deep layer-wise learning: heads that are fitted to a memory budget (thesis, chapter 6)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from layerwise.borrowing import borrowed
from layerwise.grids import FORMS, Pool, batch_norm, convolution, is_grid, pooled
from layerwise.heads import LinearHead, TokenHead
from layerwise.memory_report import Replay, backprop_memory, memory_report, stays
from layerwise.subnet import Place

__all__ = ["AffineHead", "BudgetError", "DecisionBlock"]

_VERIFICATIONS = 4
_INTERPOLATIONS = 6
_TOLERANCE = 0.005
_MB = 1e6


class BudgetError(ValueError):
    """A memory budget that cannot be kept.

    Attributes
    ----------
    smallest : int
        Bytes that are needed at least.
    """

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True)
class AffineHead:
    """Fully connected layers on all that the unit gives, without averaging: the decision layer of the thesis's section 6.4,
    and, with two hidden ones, that of its VGG-13.

    Attributes
    ----------
    hidden : tuple of int
        Widths of hidden layers, each followed by ReLU and dropout.
    dropout : float
        Probability.
    """

    hidden: tuple[int, ...] = ()
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if any(width < 1 for width in self.hidden) or not 0 <= self.dropout <= 1:
            raise ValueError(f"AffineHead: expected positive widths and a dropout from 0 to 1, got {self}")

    def build(self, example: Tensor, classes: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        features = example[0].numel()
        for width in self.hidden:
            layers += [nn.Linear(features, width), nn.ReLU(inplace=True), nn.Dropout(self.dropout)]
            features = width
        return nn.Sequential(*layers, nn.Linear(features, classes))


@dataclass(frozen=True)
class DecisionBlock:
    """Layers that narrow, then a linear classifier, as large as a memory budget allows (thesis, 6.2.2, 6.6.3 and 6.7).

    Of images: 3 x 3 convolutions with stride 2, each with batch normalisation and ReLU, then an average and a linear layer.
    Of tokens: layer normalisation, linear layers with GELU on every token, the tokens' mean, a linear layer. Of features:
    linear layers with batch normalisation and ReLU, and one without. Linear layers halve in width from one to the next.

    With a budget, the block is sized when its window's training begins, so that the most memory that training takes, with
    the batch size, optimiser, feednet, weights of all units and heads trained before, is as large as the budget allows. The
    thesis does not say how it searched. Here: from `max_convs` layers down to one (no more than the image can be halved),
    find the largest width, of at least `min_channels`, that keeps the budget. Take the first number of layers that comes
    within half a point of it (of a budget in bytes, half a percent) or has the largest width allowed; else the one that
    comes closest; the average and classifier alone if no layer fits. Memory grows with the width, so the search is one for
    a root: secant, false position, bisection. Each trial is a prediction (:func:`~layerwise.memory_report`), which computes
    nothing. The block that it ends with is verified by measuring a few steps; should these need more than predicted (on
    CUDA, workspaces of kernels), the search is repeated with a budget lower by the difference.

    Attributes
    ----------
    budget : int, float or None
        Bytes (int), or a fraction above 0 and up to 1 (float) of `reference`; None means no budget.
    max_convs : int
        Most narrowing layers.
    convs, channels : int or None
        Narrowing layers and the width of the first, where they are not to be searched for. Without a budget, None means
        `max_convs`, or as often as the image can be halved, and as wide as the unit.
    min_channels, max_channels : int or None
        Least and largest width that are searched. None means the number of classes, and no limit: what memory is left, wide
        blocks fill, at the expense of time. Linear layers are never wider than the unit's output.
    pool : int
        Side of the grid of averages before the classifier of images: 1 or 2.
    reference : {"total", "activations"}
        What a fraction is of. "total": all the memory of full backpropagation with the same batch size, as in table 6.3 of the
        thesis. "activations": what its steps need beyond parameters, buffers and optimiser state; the same of the window is
        then held against it.
    verify : bool
        Whether the block is measured. A resumed training takes the sizes from its checkpoint.

    Raises
    ------
    BudgetError
        When the training begins, if no block keeps the budget; it names the smallest figure that can be reached.
    """

    budget: int | float | None = None
    max_convs: int = 4
    convs: int | None = None
    channels: int | None = None
    min_channels: int | None = None
    max_channels: int | None = None
    pool: int = 1
    reference: str = "total"
    verify: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.budget, Integral) and not isinstance(self.budget, bool):  # NumPy's too
            object.__setattr__(self, "budget", int(self.budget))
        elif self.budget is not None and not isinstance(self.budget, float):
            raise TypeError(f"budget: expected bytes (an int), a fraction (a float) or None, got {self.budget!r}")
        if isinstance(self.budget, float) and not 0 < self.budget <= 1:
            raise ValueError(f"budget: expected bytes (an int) or a fraction above 0 and up to 1, got {self.budget}")
        if isinstance(self.budget, int) and self.budget < 1:
            raise ValueError(f"budget: expected a positive number of bytes, got {self.budget}")
        if self.reference not in ("total", "activations"):
            raise ValueError(f"reference: expected 'total' or 'activations', got {self.reference!r}")
        if self.max_convs < 0 or self.pool < 1:
            raise ValueError(f"DecisionBlock: expected max_convs of at least 0 and pool of at least 1, got {self}")
        if any(size is not None and size < 1 for size in (self.channels, self.min_channels, self.max_channels)):
            raise ValueError(f"DecisionBlock: expected positive channels, min_channels and max_channels, got {self}")
        if self.convs is not None and self.convs < 0:
            raise ValueError(f"convs: expected at least 0, got {self.convs}")

    @property
    def sizes(self) -> dict[str, int]:
        """Of a block whose sizes are fixed."""
        if self.convs is None or self.channels is None:
            raise ValueError("sizes: the block has not been sized yet")
        return {"convs": self.convs, "channels": self.channels}

    def build(self, example: Tensor, classes: int) -> nn.Module:
        if self.budget is not None:
            raise ValueError(
                "DecisionBlock: a budget needs to be sized for a place in a chain (size_for), as LayerwiseTrainer does"
            )
        block = self._fixed(example)
        return _build(block.convs or 0, block.channels or 1, self.pool, example, classes)

    def size_for(self, place: Place, sizes: dict[str, int] | None = None) -> DecisionBlock:
        """The block with its sizes fixed."""
        if sizes is not None:
            return replace(self, budget=None, convs=sizes["convs"], channels=sizes["channels"])
        if self.budget is None:
            return self._fixed(place.output)
        search = _Search(self, place)
        block = search.run()
        if self.verify and not isinstance(place.output, FakeTensor):
            block = search.verify(block)
        return block

    def _fixed(self, example: Tensor) -> DecisionBlock:
        """Without a budget: what was given, the rest by default."""
        convs = min(self.max_convs, _most_convs(example)) if self.convs is None else self.convs
        return replace(self, budget=None, convs=convs, channels=self.channels or _width(example))


def _width(example: Tensor) -> int:
    return example.shape[2] if example.dim() == 3 else example.shape[1]


def _most_convs(example: Tensor) -> int:
    """Convolutions until the image is a single cell; of anything else, as many as are wanted."""
    return math.ceil(math.log2(max(example.shape[2:]))) if is_grid(example) else 1_000


def _build(convs: int, channels: int, pool: int, example: Tensor, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    if is_grid(example):
        if convs == 0:
            return LinearHead(pool=pool).build(example, classes)
        width, sides = example.shape[1], list(example.shape[2:])
        for _ in range(convs):
            layer, sides = convolution(width, channels, sides, stride=2)
            layers += [layer, batch_norm(channels, sides), nn.ReLU(inplace=True)]
            width = channels
        return nn.Sequential(*layers, Pool(pool), nn.Flatten(), nn.Linear(width * pooled(sides, pool), classes))
    widths = [max(classes, channels // 2**i) for i in range(convs)]
    if example.dim() == 3:
        width = example.shape[2]
        layers.append(nn.LayerNorm(width))
        for narrow in widths:
            layers += [nn.Linear(width, narrow), nn.GELU()]
            width = narrow
        return nn.Sequential(*layers, TokenHead().build(example.new_empty(0, 1, width), classes))
    if example.dim() != 2:
        raise ValueError(f"DecisionBlock: expected {FORMS}, got {tuple(example.shape)}")
    width = example.shape[1]
    for narrow in widths:
        layers += [nn.Linear(width, narrow, bias=False), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True)]
        width = narrow
    return nn.Sequential(*layers, nn.Linear(width, classes))


class _Search:
    """The largest block that keeps a limit.

    Attributes
    ----------
    limit : int
        Bytes that the budget stands for.
    """

    def __init__(self, spec: DecisionBlock, place: Place) -> None:
        self.spec = spec
        self.place = place
        self.options: dict[str, Any] = {
            "amp": place.amp,
            "accumulate": place.accumulate,
            "clip_norm": place.clip_norm,
            "feed_batch": place.feed_batch,
        }
        self.of_steps = isinstance(spec.budget, float) and spec.reference == "activations"
        self.others = 0 if self.of_steps else stays(place.trainings.values())
        self.whole: int | None = None
        self.limit = spec.budget if isinstance(spec.budget, int) else self._share(spec.budget or 0.0)
        self.workspace = 0  # what kernels were measured to need beyond predictions
        self.predicted: dict[DecisionBlock, int] = {}
        self.replay: Replay | None = None

    def _share(self, fraction: float) -> int:
        plain = replace(self.place.method, head=LinearHead())
        use = backprop_memory(self.place.chain, plain, self.place.inputs, self.place.classes, **self.options)
        self.whole = use.peak if self.of_steps else use.total
        return int(fraction * self.whole)

    def _count(self, block: DecisionBlock, measure: bool) -> int:
        """Bytes that are held against the limit, with `block` as the window's head."""
        place = self.place
        method = replace(place.method, head=block, last_head=block)
        row = memory_report(
            place.chain,
            method,
            place.inputs,
            place.classes,
            window=place.window,
            target=place.target,
            measure=measure,
            replay=None if measure else self.replay,
            **self.options,
        ).rows[0]
        return row.step_peak if self.of_steps else row.total + self.others

    def need(self, block: DecisionBlock) -> int:
        """The same, predicted, and with the workspace known so far."""
        if block not in self.predicted:
            self.predicted[block] = self._count(block, measure=False)
        return self.predicted[block] + self.workspace

    def run(self) -> DecisionBlock:
        """The block, or BudgetError."""
        spec, place = self.spec, self.place
        least = spec.min_channels or place.classes
        limits = [spec.max_channels, None if is_grid(place.output) else _width(place.output)]
        most = min((max(least, limit) for limit in limits if limit is not None), default=None)
        highest = min(spec.max_convs, _most_convs(place.output))
        fill = self.limit - _TOLERANCE * (self.whole or self.limit)
        found: list[DecisionBlock] = []
        with borrowed(place.chain):
            if place.window[0] > 0:
                self.replay = Replay(place.chain, place.inputs, place.window[0], place.amp, place.feed_batch)
            for convs in [spec.convs] if spec.convs is not None else range(highest, -1, -1):
                widest = self._widest(convs, least, most, searched=bool(found))
                if widest is not None:
                    found.append(replace(spec, budget=None, convs=convs, channels=widest))
                    if self.need(found[-1]) >= fill or widest == most:
                        break
            self.replay = None
        if not found:
            raise self._too_small()
        return max(found, key=self.need)

    def _widest(self, convs: int, least: int, most: int | None, searched: bool) -> int | None:
        """The largest width of so many layers that keeps the limit, if one does."""

        def excess(width: int) -> int:
            return self.need(replace(self.spec, budget=None, convs=convs, channels=width)) - self.limit

        own = _width(self.place.output)
        if convs > 0 and self.spec.channels is None:
            return _largest(excess, least, max(2 * least, own), most)
        width = self.spec.channels or own
        return width if not searched and excess(width) <= 0 else None

    def verify(self, block: DecisionBlock) -> DecisionBlock:
        """The block, or a smaller one, whose measured need keeps the limit."""
        for _ in range(_VERIFICATIONS):
            beyond = self._count(block, measure=True) - self.need(block)
            if self.need(block) + beyond <= self.limit:
                return block
            self.workspace += beyond
            block = self.run()
        raise self._too_small()

    def _too_small(self) -> BudgetError:
        first, last = self.place.window
        units = f"units {first} to {last}" if first < last else f"unit {first} ({self.place.chain[first].name})"
        smallest = min(self.predicted.values()) + self.workspace
        wanted, reached = f"{self.limit / _MB:.4g} MB", f"{smallest / _MB:.4g} MB"
        if self.whole is not None:
            of = "steps" if self.of_steps else "memory"
            wanted = f"{100 * self.limit / self.whole:.4g} % of full backpropagation's {of} ({wanted})"
            reached = f"{100 * smallest / self.whole:.4g} % ({reached})"
        return BudgetError(
            f"{units}: the budget is {wanted}, and no decision block needs less than {reached}; give that much, a smaller "
            "batch, or smaller units",
            smallest,
        )


def _largest(excess: Callable[[int], int], least: int, start: int, most: int | None) -> int | None:
    """The largest whole number from `least` to `most` with excess <= 0, which grows; None if there is none.

    The secant leads to a number beyond it, false position (Illinois), then bisection between.
    """
    low, below = least, excess(least)
    if below > 0:
        return None
    high = max(start, low + 1)
    while True:
        high = high if most is None else min(high, most)
        if high <= low:
            return low
        above = excess(high)
        if above > 0:
            break
        slope = (above - below) / (high - low)
        ahead = 2 * high if slope <= 0 else high + int(-above / slope) + 1
        low, below, high = high, above, min(8 * high, ahead)
    weights: list[float] = [below, above]
    side = turn = 0
    while high - low > 1:
        part = -weights[0] / (weights[1] - weights[0]) if turn < _INTERPOLATIONS else 0.5
        guess = min(max(low + int((high - low) * part), low + 1), high - 1)
        value = excess(guess)
        turn += 1
        end = int(value > 0)
        if end == 0:
            low = guess
        else:
            high = guess
        weights[end] = value
        if turn > 1 and side == end:
            weights[1 - end] /= 2  # the end that stays counts less
        side = end
    return low
