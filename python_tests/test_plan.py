"""How tensors are divided among ranks and cut into pieces."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from weight_compression.distributed.plan import (
    EXACT_BELOW,
    PIECE,
    WHOLE_BELOW,
    Ownership,
    make_owned_pieces,
    make_pieces,
)

RANKS = st.integers(1, 7)
SIZES = st.lists(
    st.one_of(
        st.integers(0, 3000),
        st.integers(0, 8 * WHOLE_BELOW),
        st.sampled_from([EXACT_BELOW - 1, EXACT_BELOW, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 17]),
    ),
    max_size=8,
)


def fragments_of(pieces):
    """(tensor, start, stop, owner, sent exactly), piece by piece."""
    return [
        (f.tensor, f.start, f.stop, f.owner, exact)
        for piece in pieces
        for exact, by_owner in ((False, piece.coded), (True, piece.exact))
        for of_owner in by_owner
        for f in of_owner
    ]


def check_every_element_once(pieces, sizes, ranks):
    ends = {}
    for tensor, start, stop, owner, _ in sorted(fragments_of(pieces)):
        assert ends.get(tensor, 0) == start < stop
        assert 0 <= owner < ranks
        ends[tensor] = stop
    assert ends == {i: numel for i, numel in enumerate(sizes) if numel}
    for piece in pieces:
        assert len(piece.coded) == len(piece.exact) == ranks
        for owner in range(ranks):
            for f in (*piece.coded[owner], *piece.exact[owner]):
                assert f.owner == owner
            assert piece.payloads(owner) == len(piece.coded[owner]) + (1 if piece.exact[owner] else 0)


@given(SIZES, RANKS)
def test_every_element_is_in_exactly_one_fragment(sizes, ranks):
    pieces = make_pieces(list(enumerate(sizes)), ranks, Ownership(ranks))
    assert pieces == make_pieces(list(enumerate(sizes)), ranks, Ownership(ranks))  # as on another rank
    check_every_element_once(pieces, sizes, ranks)
    for _, start, stop, _, exact in fragments_of(pieces):
        assert exact == (stop - start < EXACT_BELOW)


@given(SIZES, RANKS)
def test_pieces_are_as_large_as_overlap_allows(sizes, ranks):
    pieces = make_pieces(list(enumerate(sizes)), ranks, Ownership(ranks))
    numels = [sum(stop - start for _, start, stop, _, _ in fragments_of([piece])) for piece in pieces]
    assert all(0 < numel <= PIECE + 64 * ranks for numel in numels)
    assert all(first + second > PIECE for first, second in itertools.pairwise(numels))


@given(SIZES, RANKS, st.randoms(use_true_random=False))
def test_fragments_and_owners_do_not_depend_on_bundling(sizes, ranks, random):
    numbered = list(enumerate(sizes))
    ownership = Ownership(ranks)
    together = fragments_of(make_pieces(numbered, ranks, ownership))
    random.shuffle(numbered)
    cut = random.randint(0, len(numbered))
    apart = []
    for bucket in (numbered[:cut], numbered[cut:]):
        for position, *rest in fragments_of(make_pieces(bucket, ranks, ownership)):
            apart.append((bucket[position][0], *rest))
    assert sorted(apart) == sorted(together)


@given(SIZES, RANKS)
def test_an_ownership_goes_on_from_its_state(sizes, ranks):
    ownership = Ownership(ranks)
    make_pieces(list(enumerate(sizes)), ranks, ownership)
    restored = Ownership.from_state_dict(ownership.state_dict())
    more = [*enumerate(sizes), (100, 5), (101, 1000), (102, 7)]
    assert make_pieces(more, ranks, restored) == make_pieces(more, ranks, ownership)


@given(st.lists(st.integers(1, WHOLE_BELOW), min_size=1, max_size=50), RANKS)
def test_small_tensors_are_spread_evenly(sizes, ranks):
    pieces = make_pieces(list(enumerate(sizes)), ranks, Ownership(ranks))
    loads = [0] * ranks
    for _, start, stop, owner, _ in fragments_of(pieces):
        loads[owner] += stop - start
    assert max(loads) - min(loads) <= max(sizes)  # each went to the rank with the least


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("numel", [WHOLE_BELOW * 8, PIECE + 1, 5 * PIECE - 77])
def test_large_tensors_are_divided_evenly_in_every_piece(ranks, numel):
    for piece in make_pieces([(0, numel)], ranks, Ownership(ranks)):
        loads = [sum(f.numel for f in of_owner) for of_owner in piece.coded]
        assert max(loads) - min(loads) <= 128
        assert sum(loads) <= PIECE + 64 * ranks


@given(SIZES, RANKS, st.data())
def test_owned_tensors_are_cut_too(sizes, ranks, data):
    owned = [(data.draw(st.integers(0, ranks - 1)), numel) for numel in sizes]
    pieces = make_owned_pieces(owned, ranks)
    check_every_element_once(pieces, sizes, ranks)
    assert all(owner == owned[tensor][0] for tensor, _, _, owner, _ in fragments_of(pieces))
