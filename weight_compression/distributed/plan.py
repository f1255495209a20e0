"""Which rank adds up what, and in which pieces it travels. No communication, no coding.

Every tensor is cut into *fragments*, each with an owner, who adds up all ranks' values of it and sends the sum to all. A
large tensor has a fragment for every rank, or several; a small one belongs to one rank as a whole. Fragments are put
together to *pieces*, which are coded, sent and decoded one behind the other, so that these three overlap.

Who owns what follows from a tensor's number and size alone, not from how tensors are bundled: errors that were kept for a
parameter stay right when DDP rebuilds its buckets.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Fragment", "Ownership", "Piece", "make_owned_pieces", "make_pieces"]

WHOLE_BELOW = 1 << 16  # elements for every rank: smaller tensors are not divided
EXACT_BELOW = 1 << 10  # elements: describing a quantiser would cost more than it saves
PIECE = 1 << 22  # elements at most, about, of a piece that all ranks have together
ALIGNMENT = 64  # elements


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements `start` to `stop` of the flat tensor number `tensor`."""

    tensor: int
    start: int
    stop: int
    owner: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Piece:
    """Fragments by owner: the coded ones, and those so small that they are sent as they are."""

    coded: tuple[tuple[Fragment, ...], ...]
    exact: tuple[tuple[Fragment, ...], ...]

    def payloads(self, owner: int) -> int:
        """How many payloads the fragments of an owner are: one for every coded one, one for all others together."""
        return len(self.coded[owner]) + bool(self.exact[owner])


class Ownership:
    """Who owns the small tensors: whoever has the least when a tensor is seen for the first time."""

    def __init__(self, ranks: int) -> None:
        self._load = [0] * ranks
        self._owner: dict[int, int] = {}

    def __getitem__(self, tensor_and_numel: tuple[int, int]) -> int:
        tensor, numel = tensor_and_numel
        if tensor not in self._owner:
            owner = self._load.index(min(self._load))
            self._owner[tensor] = owner
            self._load[owner] += numel
        return self._owner[tensor]

    @property
    def ranks(self) -> int:
        return len(self._load)

    def state_dict(self) -> dict[str, list]:
        return {"load": list(self._load), "owner": list(self._owner.items())}

    @classmethod
    def from_state_dict(cls, state: dict[str, list]) -> Ownership:
        made = cls(len(state["load"]))
        made._load, made._owner = list(state["load"]), dict(state["owner"])
        return made


def make_pieces(tensors: Sequence[tuple[int, int]], ranks: int, ownership: Ownership) -> list[Piece]:
    """The pieces of tensors given by (number, elements). Numbers of pieces' fragments are positions in `tensors`.

    All ranks have to ask for the same in the same order.
    """
    pieces: list[Piece] = []
    held: list[Fragment] = []
    size = 0
    for position, (number, numel) in enumerate(tensors):
        for unit in _units(position, number, numel, ranks, ownership):
            more = sum(fragment.numel for fragment in unit)
            if held and size + more > PIECE:
                pieces.append(_piece(held, ranks))
                held, size = [], 0
            held += unit
            size += more
    if held:
        pieces.append(_piece(held, ranks))
    return pieces


def _units(position: int, number: int, numel: int, ranks: int, ownership: Ownership) -> list[list[Fragment]]:
    """A tensor's fragments, those together that should travel together."""
    if numel == 0:
        return []
    if numel < WHOLE_BELOW * ranks:
        return [[Fragment(position, 0, numel, ownership[number, numel])]]
    steps = -(-numel // PIECE)
    shards = _divide(0, numel, ranks)
    chunks = [_divide(start, stop, steps) for start, stop in shards]
    return [[Fragment(position, *chunks[rank][step], rank) for rank in range(ranks)] for step in range(steps)]


def _divide(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """Cuts between aligned elements. Every part is far longer than the alignment."""
    cuts = [start + (stop - start) * i // parts // ALIGNMENT * ALIGNMENT for i in range(parts)] + [stop]
    return list(itertools.pairwise(cuts))


def _piece(fragments: list[Fragment], ranks: int) -> Piece:
    by_owner: list[list[Fragment]] = [[] for _ in range(ranks)]
    for fragment in fragments:
        by_owner[fragment.owner].append(fragment)
    coded = tuple(tuple(f for f in own if f.numel >= EXACT_BELOW) for own in by_owner)
    exact = tuple(tuple(f for f in own if f.numel < EXACT_BELOW) for own in by_owner)
    return Piece(coded, exact)


def make_owned_pieces(tensors: Sequence[tuple[int, int]], ranks: int) -> list[Piece]:
    """The pieces of tensors given by (owner, elements), where only the owner has values."""
    most = max(1, PIECE // max(1, len({owner for owner, _ in tensors})))
    steps = max((-(-numel // most) for _, numel in tensors), default=0)
    pieces = []
    for step in range(steps):
        fragments = []
        for position, (owner, numel) in enumerate(tensors):
            start, stop = step * most, min(numel, (step + 1) * most)
            if start < stop:
                fragments.append(Fragment(position, start, stop, owner))
        pieces.append(_piece(fragments, ranks))
    return pieces
