"""Samples that a window need not see: k-filtering and loss filtering (thesis, sections 5.4, 6.8.2 and 6.8.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from layerwise.feednet import Batch
from layerwise.heads import scores_of
from layerwise.neighbours import cap_dropped, check_share, k_redundant
from layerwise.schedules import Stage
from layerwise.units import State, join_constants, main_tensor, resize_constants, split_constants

__all__ = ["Filter", "KFilter", "LossFilter", "check_filters", "filtered", "losses_under"]

LossOf = Callable[[State, Tensor], Tensor]


@runtime_checkable
class Filter(Protocol):
    """Something that thins out the batches that reach a window.

    Attributes
    ----------
    equal_counts : bool
        Whether equally many samples always leave equally many. Data-parallel workers, which step together, need that.
    """

    equal_counts: ClassVar[bool]

    def apply(self, stream: Iterator[Batch], epoch: int, loss_of: LossOf | None = None) -> Iterator[Batch]:
        """The batches that are left in the window's `epoch`-th epoch, counted from 0.

        `loss_of` gives the losses (B,) of a batch under the head on the unit right below; None where there is none.
        """


@dataclass(frozen=True)
class KFilter:
    """Drops samples whose k nearest neighbours, among many that enter the window together, are all of their class.

    The batches that enter are gathered, what :func:`~layerwise.k_redundant` finds in their main tensor is dropped, and the
    rest is cut into batches of the loader's size again. No more than `batch` samples and two of the loader's batches are
    gathered at a time; while they are looked through, there are a few copies of them. Random choices are made by torch's
    generator.

    Attributes
    ----------
    k : int
        Neighbours.
    batch : int
        Samples that are gathered, at most.
    cap : float
        Largest share of them that is dropped; of more redundant ones, a random choice.
    start_epoch : int
        The window's first epoch, counted from 0, in which samples are dropped.

    Notes
    -----
    The defaults are those of section 6.8.2 of the thesis.
    """

    equal_counts: ClassVar[bool] = False

    k: int = 10
    batch: int = 6148
    cap: float = 0.6
    start_epoch: int = 30

    def __post_init__(self) -> None:
        if self.k < 1 or self.batch <= self.k:
            raise ValueError(
                f"KFilter: expected k of at least 1 and a larger batch, got k={self.k}, batch={self.batch}"
            )
        check_share("KFilter: cap", self.cap)
        _check_start(self.start_epoch)

    def apply(self, stream: Iterator[Batch], epoch: int, loss_of: LossOf | None = None) -> Iterator[Batch]:
        return stream if epoch < self.start_epoch else _rebatch(stream, self.batch, self._kept)

    def _kept(self, state: State, target: Tensor) -> Tensor:
        m = len(target)
        if m <= self.k:
            return torch.arange(m)
        redundant = k_redundant(main_tensor(state), target, self.k).cpu()
        kept = torch.ones(m, dtype=torch.bool)
        kept[cap_dropped(redundant, self.cap)] = False
        return kept.nonzero()[:, 0]


_NO_HEAD_BELOW = (
    "LossFilter needs a trained head on the unit right below the window, and there is none. For the other windows alone: "
    "filtering=lambda unit: LossFilter() if unit > 0 else None"
)


@dataclass(frozen=True)
class LossFilter:
    """Drops the samples with the lowest losses under the head on the unit right below (thesis, section 6.8.4).

    The loss is the cross-entropy of that head's scores. Nothing is below the first unit: for a schedule that trains it too,
    give the method ``filtering=lambda unit: LossFilter() if unit > 0 else None``.

    Attributes
    ----------
    fraction : float
        Share of the samples that is dropped, rounded down.
    start_epoch : int
        The window's first epoch, counted from 0, in which samples are dropped.
    batch : int
        Samples, at most, among which the lowest losses are looked for.
    """

    equal_counts: ClassVar[bool] = True

    fraction: float = 0.25
    start_epoch: int = 30
    batch: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise ValueError(f"LossFilter: fraction: expected a share from 0 to below 1, got {self.fraction}")
        if self.batch < 1:
            raise ValueError(f"LossFilter: batch: expected at least 1 sample, got {self.batch}")
        _check_start(self.start_epoch)

    def apply(self, stream: Iterator[Batch], epoch: int, loss_of: LossOf | None = None) -> Iterator[Batch]:
        if epoch < self.start_epoch:
            return stream
        if loss_of is None:
            raise ValueError(_NO_HEAD_BELOW)

        def kept(state: State, target: Tensor) -> Tensor:
            dropped = int(self.fraction * len(target))
            return loss_of(state, target).argsort(stable=True)[dropped:].sort().values

        return _rebatch(stream, self.batch, kept)


def check_filters(
    stages: Sequence[Stage], filter_of: Callable[[int], Filter | None], distributed: bool = False
) -> None:
    """Refuse a schedule in which a filter lacks what it needs.

    Raises
    ------
    ValueError
        If no head is trained right below a window with a :class:`LossFilter`, or `distributed` workers would get different
        numbers of batches.
    """
    ends: set[int] = set()  # of windows that are trained before
    for stage in stages:
        first = stage.windows[0][0]
        chosen = filter_of(first)
        if any(filter_of(window[0]) != chosen for window in stage.windows[1:]):
            raise ValueError(
                "filtering: windows that train at the same time share their samples, so that they need one filter; train them "
                "one after the other to filter some alone"
            )
        if isinstance(chosen, LossFilter) and first - 1 not in ends:
            raise ValueError(_NO_HEAD_BELOW)
        if distributed and chosen is not None and not chosen.equal_counts:
            raise ValueError(
                "filtering: workers step together, but a filter that leaves differing numbers of samples gives them differing "
                "numbers of batches; use LossFilter, or none"
            )
        ends |= {last for _, last in stage.windows}


def losses_under(head: nn.Module, amp: torch.dtype | None) -> LossOf:
    """A function of a batch that gives the samples' cross-entropies under a head, without a graph and in eval mode."""

    @torch.no_grad()
    def loss_of(state: State, target: Tensor) -> Tensor:
        head.eval()
        with torch.autocast(target.device.type, amp, enabled=amp is not None):
            scores = scores_of(head(main_tensor(state)))
        return F.cross_entropy(scores.float(), target, reduction="none")

    return loss_of


def _check_start(epoch: int) -> None:
    if epoch < 0:
        raise ValueError(f"start_epoch: expected at least 0, got {epoch}")


# ---- batches out of batches ----


def filtered(
    filtering: Filter, stream: Iterator[Batch], epoch: int, loss_of: LossOf | None, constants: int
) -> Iterator[Batch]:
    """``filtering.apply``, which gets states without their first `constants` values: these are put back afterwards."""
    if constants == 0:
        return filtering.apply(stream, epoch, loss_of)
    first: list[tuple[tuple[object, ...], int]] = []

    def strip(batch: Batch) -> Batch:
        state, target = batch
        own, features = split_constants(state, constants)
        if not first:
            first.append((own, len(target)))
        expected = tree_leaves(resize_constants(*first[0], len(target)))
        if not all(map(_is_same, expected, tree_leaves(own))):
            raise TypeError(
                "filtering: expected the same from batch to batch of what crosses beside the features, such as masks; give "
                "sequences of one length, or let the units be cut elsewhere"
            )
        return features, target

    def restore(batch: Batch) -> Batch:
        state, target = batch
        return join_constants(resize_constants(*first[0], len(target)), state), target

    return map(restore, filtering.apply(map(strip, stream), epoch, loss_of))


def _is_same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def _rebatch(stream: Iterator[Batch], most: int, kept: Callable[[State, Tensor], Tensor]) -> Iterator[Batch]:
    """Gather up to `most` samples, keep those with the numbers that `kept` gives, and cut batches of the size that came.

    Less than two batches are carried over; at the end they make one batch or two halves, so that none is very small.
    """
    size, came, rest = 0, 0, None
    for group in _gather(stream, most):
        size = max(size, *(len(target) for _, target in group))
        whole = _concatenate(group)
        came += len(whole[1])
        some = _rows(whole, kept(*whole).to(whole[1].device))
        rest = some if rest is None else _concatenate([rest, some])
        del whole, some, group
        while len(rest[1]) >= 2 * size:
            yield _rows(rest, slice(size))
            rest = _rows(rest, slice(size, None))
    if rest is None:
        return
    left = len(rest[1])
    if left == 0 and came:
        raise ValueError(
            f"filtering has dropped all of the last {came} samples; a cap below 1 or a larger k keeps some"
        )
    middle = left if left <= size else -(-left // 2)
    yield _rows(rest, slice(middle))
    if middle < left:
        yield _rows(rest, slice(middle, None))


def _gather(stream: Iterator[Batch], most: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    samples = 0
    for batch in stream:
        came = len(batch[1])
        if came > most:
            raise ValueError(f"filtering: batch={most} is less than one batch of the loader, {came} samples")
        if samples + came > most:
            yield group
            group, samples = [], 0
        group.append(batch)
        samples += came
    if group:
        yield group


def _concatenate(batches: list[Batch]) -> Batch:
    flat = [tree_flatten(batch) for batch in batches]
    for (leaves, _), (_, target) in zip(flat, batches, strict=True):
        odd = [x for x in leaves if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != len(target)]
        if odd:
            got = tuple(odd[0].shape) if isinstance(odd[0], Tensor) else repr(odd[0])
            raise TypeError(
                f"filtering: expected states of tensors with a row for each of the {len(target)} samples, got {got}; let the "
                "units be cut where such states cross"
            )
    forms = [(str(structure), [tuple(x.shape[1:]) for x in leaves]) for leaves, structure in flat]
    other = next((form for form in forms if form != forms[0]), None)
    if other is not None:
        raise TypeError(
            f"filtering: expected states of one form in all batches, got rows of {forms[0][1]} and {other[1]}"
        )
    structure = flat[0][1]
    return tree_unflatten([torch.cat(same) for same in zip(*(leaves for leaves, _ in flat), strict=True)], structure)


def _rows(batch: Batch, rows: slice | Tensor) -> Batch:
    return tree_map(lambda x: x[rows], batch)
