"""Redundant samples: those whose nearest neighbours are all of their own class (thesis, section 5.4).

A sample is k-redundant where fewer than k samples of its class are *not* closer to it than the nearest sample of another
class is. So one number per sample, how many of its class are closer than the nearest of another, answers for every k.

Distances come from matrix products, tile by tile of the symmetric matrix, in float32 and with a bound of their rounding
error. The few samples that the bound leaves open are gone through again in float64, and what that leaves open, ties for the most
part, by differences. So the answer is exact, whatever the threads, the tiles and the order of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from platonic_core.arrays import Origin, to_torch

__all__ = ["k_filter", "k_redundancy", "k_redundant"]

_SIDES = {"cpu": (512, 1024)}  # of tiles, least and most: those of a CPU stay in its cache
_SIDES_ELSEWHERE = 2048, 8192
_PART = 1 << 18  # numbers that are converted at a time
_DEPTH = 1024  # features in one product, so that the rounding error of many stays small
_SLACK = 12  # roundings beside those of the products: of the features, norms, sums and comparisons
_MEMORY = 256 << 20


@overload
def k_redundancy(Z: Any, y: Any, k: int, *, memory_limit: int = ...) -> float: ...
@overload
def k_redundancy(Z: Any, y: Any, k: Sequence[int], *, memory_limit: int = ...) -> list[float]: ...
def k_redundancy(Z: Any, y: Any, k: int | Sequence[int], *, memory_limit: int = _MEMORY) -> float | list[float]:
    """Share of the samples that are k-redundant (thesis, definition 8); of several k a list.

    The arguments are those of :func:`k_redundant`.
    """
    data, labels, ks, _ = _read(Z, y, k)
    shares = _redundant(data, labels, ks, memory_limit).double().mean(1).tolist()
    return shares[0] if isinstance(k, int) else shares


def k_redundant(Z: Any, y: Any, k: int | Sequence[int], *, memory_limit: int = _MEMORY) -> Any:
    """Which samples have k nearest neighbours that are all of their own class (thesis, section 5.4).

    Neighbours are the closest other samples by Euclidean distance. Where some are equally far, all of them have to be of the
    sample's class: it is redundant only if k samples of its class are strictly closer than the nearest of another. Distances
    count as equal if they agree to within the rounding of their float64 sums; so do those to identical samples.

    Parameters
    ----------
    Z : Tensor or array (m, ...)
        Samples; everything but the first dimension is flattened. Real numbers of any type.
    y : Tensor or array (m,)
        Their classes, numbers of any kind.
    k : int or sequence of int
        Number of neighbours, 1 to m - 1. Several cost hardly more than one.
    memory_limit : int, default=256 MiB
        Bytes for distances, beside two copies of the samples, one of them in float32.

    Returns
    -------
    Tensor or array of bool
        (m,), or for a sequence of k (len(k), m); in the library and on the device of `Z`.

    Raises
    ------
    ValueError
        If shapes do not match, a k is out of range, or a value is infinite or not a number.
    """
    data, labels, ks, origin = _read(Z, y, k)
    redundant = _redundant(data, labels, ks, memory_limit)
    return origin.back(redundant[0] if isinstance(k, int) else redundant)


def k_filter(
    X: Any,
    y: Any,
    k: int | Sequence[int],
    *,
    batch: int | None = None,
    cap: float | None = None,
    generator: torch.Generator | None = None,
    memory_limit: int = _MEMORY,
) -> Any:
    """Indices of the samples that k-filtering keeps, ascending (thesis, section 5.4).

    Parameters
    ----------
    X, y, k, memory_limit
        See :func:`k_redundant`.
    batch : int, optional
        Neighbours are looked for in random parts of at most so many samples, of equal size but for one, which is faster and
        keeps more; None means among all.
    cap : float, optional
        Largest share of a part that is dropped, 0 to 1; which of more redundant ones are dropped is drawn at random.
    generator : Generator, optional
        Of the parts and draws; None means torch's.

    Returns
    -------
    Tensor or array of int64
        In the library and on the device of `X`; for a sequence of k a list of them.
    """
    data, labels, ks, origin = _read(X, y, k)
    m = len(data)
    if batch is not None and batch <= max(ks):
        raise ValueError(f"batch: expected more than k={max(ks)} samples, got {batch}")
    check_share("cap", cap)
    if batch is None or batch >= m:
        parts = [torch.arange(m)]
    else:
        parts = list(torch.randperm(m, generator=generator).tensor_split(math.ceil(m / batch)))
    kept = torch.ones(len(ks), m, dtype=torch.bool)
    for part in parts:
        index = part.to(data.device)
        whole = len(parts) == 1
        redundant = _redundant(data if whole else data[index], labels if whole else labels[index], ks, memory_limit)
        for row, dropped in zip(kept, redundant.cpu(), strict=True):
            row[part[cap_dropped(dropped, cap, generator)]] = False
    indices = [origin.back(row.nonzero()[:, 0].to(data.device)) for row in kept]
    return indices[0] if isinstance(k, int) else indices


def cap_dropped(dropped: Tensor, cap: float | None, generator: torch.Generator | None = None) -> Tensor:
    """Ascending numbers of the samples that a mask (on the CPU) marks, or, of more than the share `cap`, a random choice."""
    found = dropped.nonzero()[:, 0]
    most = len(dropped) if cap is None else int(cap * len(dropped))
    if len(found) > most:
        found = found[torch.randperm(len(found), generator=generator)[:most]].sort().values
    return found


def check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")


# ---- one pass over the distances ----


def _read(Z: Any, y: Any, k: int | Sequence[int]) -> tuple[Tensor, Tensor, list[int], Origin]:
    """Samples (m, d), classes as numbers 0, 1, ... on their device, and every k."""
    data, origin = to_torch(Z)
    labels = to_torch(y)[0].to(data.device)
    if data.dim() < 2 or labels.shape != data.shape[:1]:
        raise ValueError(
            f"expected samples (m, ...) and classes (m,), got {tuple(data.shape)} and {tuple(labels.shape)}"
        )
    if data.is_complex():
        raise ValueError("expected real samples, got complex ones; give real and imaginary parts as features")
    ks = [k] if isinstance(k, int) else list(k)
    if data.numel() == 0:
        raise ValueError(f"expected samples with at least one feature, got {tuple(data.shape)}")
    if not ks or any(isinstance(n, bool) or not 1 <= n < len(data) for n in ks):
        raise ValueError(f"k: expected 1 to {len(data) - 1} neighbours among {len(data)} samples, got {k}")
    return data.detach().flatten(1), torch.unique(labels, return_inverse=True)[1], ks, origin


@torch.no_grad()
def _redundant(data: Tensor, labels: Tensor, ks: Sequence[int], memory_limit: int) -> Tensor:
    """(len(ks), m) bool."""
    order = labels.argsort(stable=True)
    with torch.autocast(data.device.type, enabled=False):
        samples = _Samples(data[order], labels[order], memory_limit)
        certain, possible = samples.count_closer()
        wanted = torch.tensor(ks, device=data.device)[:, None]
        redundant = certain >= wanted
        still_open = (redundant != (possible >= wanted)).any(0).nonzero()[:, 0]
        for rows in still_open.split(samples.rows_at_once):
            redundant[:, rows] = samples.count_exactly(rows) >= wanted
    result = torch.empty_like(redundant)
    result[:, order] = redundant
    return result


class _Samples:
    """Samples in order of their classes, centred and scaled so that float32 holds them well.

    The squared distance of a and b is |a|^2 + |b|^2 - 2 a b, off by no more than error(a) + error(b).
    """

    def __init__(self, data: Tensor, labels: Tensor, memory_limit: int) -> None:
        m, d = data.shape
        self.data = data
        self.labels = labels
        self.class_of = labels.tolist()
        self.memory_limit = memory_limit
        self.rows_at_once = max(1, memory_limit // (64 * m))
        step = max(1, min(_PART, memory_limit // 32) // d)
        self._parts = [slice(i, i + step) for i in range(0, m, step)]
        most = max(16, min(m, math.isqrt(memory_limit // 16)))
        self.sides = [min(side, most) for side in _SIDES.get(data.device.type, _SIDES_ELSEWHERE)]
        self._rescale()
        # Products that cut float32 down to fewer bits (TF32, bfloat16) do not keep to the bound.
        backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        reduced = any(backend.fp32_precision not in ("none", "ieee") for backend in backends)
        self.dtype = torch.float64 if reduced else torch.float32
        self.x = torch.empty(m, d, dtype=self.dtype, device=data.device)
        self.norms = torch.empty(m, dtype=torch.float64, device=data.device)
        for part in self._parts:
            centred = self.centred(part)
            self.x[part] = centred
            self.norms[part] = centred.square().sum(1)
        self._scratch = torch.empty(2, self.sides[1] ** 2, dtype=self.dtype, device=data.device)
        error = self._error(self.dtype)
        self.low = (self.norms - error).to(self.dtype)
        self.width = (2 * error).to(self.dtype)

    def _rescale(self) -> None:
        """Powers of two that bring the largest value, then the largest distance from the mean, to about 1; and that mean."""
        largest, spread = 0.0, 0.0
        for part in self._parts:
            found = self.data[part].to(torch.float64, copy=True).abs_().amax().item()
            if not math.isfinite(found):
                raise ValueError("expected finite samples, got values that are infinite or not a number")
            largest = max(largest, found)
        self.scale = _power_of_two(largest)
        self.mean = torch.stack([self.shrunk(part).sum(0) for part in self._parts]).sum(0) / len(self.data)
        self.spread = 1.0
        for part in self._parts:
            spread = max(spread, self.centred(part).abs_().amax().item())
        self.spread = _power_of_two(spread)

    def shrunk(self, rows: slice | Tensor) -> Tensor:
        """Samples in float64, of about 1 at most, without loss."""
        return self.data[rows].to(torch.float64, copy=True).mul_(1 / self.scale)

    def centred(self, rows: slice | Tensor) -> Tensor:
        return self.shrunk(rows).sub_(self.mean).mul_(1 / self.spread)

    def _error(self, dtype: torch.dtype) -> Tensor:
        """A sample's part of the error of its squared distances (m,).

        A product of d features, in pieces of `_DEPTH`, with its sums and roundings, loses at most gamma (|a| + |b|)^2 <=
        2 gamma (|a|^2 + |b|^2); gamma is the number of terms in units of the last place (Higham, Accuracy and Stability of
        Numerical Algorithms, section 3.1).
        """
        d = self.data.shape[1]
        terms = min(d, _DEPTH) + math.ceil(d / _DEPTH) if dtype == torch.float32 else d
        gamma = (terms + _SLACK) * torch.finfo(dtype).eps / 2
        return 2 * gamma * self.norms + d * torch.finfo(dtype).tiny  # the latter vanishes in products of small numbers

    # ---- all samples ----

    def count_closer(self) -> tuple[Tensor, Tensor]:
        """How many of its class are closer to a sample than any of another class: at least, and at most (m,)."""
        m = len(self.data)
        nearest = self.x.new_full((2, m), torch.inf)  # distance of the nearest of another class: at least, at most
        for r, c in self._tiles(range(m)):
            if self.class_of[r.start] != self.class_of[c.stop - 1]:
                tile = self._distances(r, c)
                if self._overlap(r, c):
                    tile.masked_fill_(self._same(r, c), torch.inf)
                _take_least(nearest[0], tile, r, c)
                _take_least(nearest[1], self._widen(tile, r, c), r, c)
        closer = torch.zeros(2, m, dtype=torch.int64, device=self.data.device)
        for some in self._groups():
            for r, c in self._tiles(some):
                others = ~self._same(r, c)
                if r == c:
                    others.fill_diagonal_(True)
                tile = self._distances(r, c).masked_fill_(others, torch.inf)
                below = self._tile(1, r, c)
                _count_below(closer[1], nearest[1], tile, below, r, c)
                _count_below(closer[0], nearest[0], self._widen(tile, r, c), below, r, c)
        return closer[0], closer[1]

    def _tiles(self, some: range) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the tiles on and above the diagonal of some samples' distances."""
        side = min(self.sides[1], max(self.sides[0], len(some) // 8))
        blocks = [slice(i, min(i + side, some.stop)) for i in range(some.start, some.stop, side)]
        for i, r in enumerate(blocks):
            for c in blocks[i:]:
                yield r, c

    def _groups(self) -> Iterator[range]:
        """All samples, cut between classes where that leaves enough for a tile."""
        start = 0
        for stop in range(1, len(self.class_of) + 1):
            ends = stop == len(self.class_of) or self.class_of[stop] != self.class_of[stop - 1]
            if ends and (stop - start >= self.sides[0] or stop == len(self.class_of)):
                yield range(start, stop)
                start = stop

    def _overlap(self, r: slice, c: slice) -> bool:
        """Whether a class is in both."""
        return self.class_of[r.stop - 1] >= self.class_of[c.start]

    def _same(self, r: slice | Tensor, c: slice) -> Tensor:
        return self.labels[r][:, None] == self.labels[c]

    def _distances(self, r: slice, c: slice) -> Tensor:
        """Squared distances less their error."""
        tile = torch.add(self.low[r][:, None], self.low[c], out=self._tile(0, r, c))
        for i in range(0, self.x.shape[1], _DEPTH):
            tile.addmm_(self.x[r, i : i + _DEPTH], self.x[c, i : i + _DEPTH].T, alpha=-2)
        return tile

    def _tile(self, number: int, r: slice, c: slice) -> Tensor:
        """Memory for a tile; that of the last one."""
        rows, columns = r.stop - r.start, c.stop - c.start
        return self._scratch[number, : rows * columns].view(rows, columns)

    def _widen(self, tile: Tensor, r: slice, c: slice) -> Tensor:
        """From less their error to more by it, in place."""
        return tile.add_(self.width[r][:, None]).add_(self.width[c])

    # ---- some samples ----

    def count_exactly(self, rows: Tensor) -> Tensor:
        """How many of its class are closer to each of these samples than any of another class, of which there is one."""
        a = self.centred(rows)
        distances = torch.empty(len(rows), len(self.data), dtype=torch.float64, device=self.data.device)
        for part in self._parts:
            sums = self.norms[rows][:, None] + self.norms[part]
            distances[:, part] = sums.addmm_(a, self.centred(part).T, alpha=-2)
        error = self._error(torch.float64)
        errors = error[rows][:, None] + error
        friends = self._same(rows, slice(None))
        least = (distances - errors).masked_fill_(friends, torch.inf)  # of other classes
        most = (distances + errors).masked_fill_(friends, torch.inf)
        friends.scatter_(1, rows[:, None], False)  # a sample is no neighbour of itself
        nearest_least, (nearest_most, other) = least.amin(1, keepdim=True), most.min(1, keepdim=True)
        certain = friends & (distances + errors < nearest_least)
        unsure = friends & ~certain & (distances - errors < nearest_most)
        # None is closer than an identical sample of another class. Known beforehand, since where all samples are identical
        # every pair is unsure.
        settled = self._by_differences(rows, other[:, 0]) == 0
        unsure &= ~settled[:, None]
        unsure |= (least <= nearest_most) & unsure.any(1, keepdim=True)
        i, j = unsure.nonzero(as_tuple=True)
        exact = self._by_differences(rows[i], j)
        friendly = friends[i, j]
        nearest = torch.full_like(nearest_least[:, 0], torch.inf)
        nearest.scatter_reduce_(0, i[~friendly], exact[~friendly], "amin")
        rounding = (self.data.shape[1] + _SLACK) * torch.finfo(torch.float64).eps
        closer = friendly & (exact < nearest[i] * (1 - rounding))
        return (certain.sum(1) + torch.bincount(i[closer], minlength=len(rows))) * ~settled

    def _by_differences(self, i: Tensor, j: Tensor) -> Tensor:
        """Squared distances of pairs that lose nothing but what summing d squares does."""
        m = len(self.data)
        if len(i) > m:  # worth finding the same pair of values among them: ties are identical samples for the most part
            pairs, places = torch.unique(self._distinct[i] * m + self._distinct[j], return_inverse=True)
            if len(pairs) < len(i):
                return self._by_differences(self._one_of[pairs // m], self._one_of[pairs % m])[places]
        found = torch.empty(len(i), dtype=torch.float64, device=i.device)
        at_once = max(1, self.memory_limit // (32 * self.data.shape[1]))
        for start in range(0, len(i), at_once):
            part = slice(start, start + at_once)
            found[part] = self.shrunk(i[part]).sub_(self.shrunk(j[part])).mul_(1 / self.spread).square_().sum(1)
        return found

    @cached_property
    def _distinct(self) -> Tensor:
        """Samples' numbers in which identical ones are the same (m,)."""
        return torch.unique(self.data, dim=0, return_inverse=True)[1]

    @cached_property
    def _one_of(self) -> Tensor:
        """A sample with each of those numbers."""
        found = torch.empty_like(self._distinct)
        found[self._distinct] = torch.arange(len(self.data), device=found.device)
        return found


def _power_of_two(value: float) -> float:
    """About `value`, such that its inverse is a number, too; 1 for 0."""
    return math.ldexp(1.0, max(-1000, min(math.frexp(value)[1], 1000))) if value else 1.0


def _take_least(least: Tensor, tile: Tensor, r: slice, c: slice) -> None:
    """Lower `least` to what is found in a tile and in its mirror image."""
    least[r] = torch.minimum(least[r], tile.amin(1))
    if r != c:
        least[c] = torch.minimum(least[c], tile.amin(0))


def _count_below(count: Tensor, bound: Tensor, tile: Tensor, below: Tensor, r: slice, c: slice) -> None:
    """Add how many of a tile's elements, and of its mirror image's, are below each sample's bound.

    They are marked in `below` by numbers, which are summed several times as fast as truth values.
    """
    count[r] += torch.lt(tile, bound[r][:, None], out=below).sum(1).long()
    if r != c:
        count[c] += torch.lt(tile, bound[c], out=below).sum(0).long()
