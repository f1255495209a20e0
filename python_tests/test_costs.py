"""What units cost, and groups of them that cost the same."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerwise import split
from layerwise.costs import balance, unit_costs

pytestmark = pytest.mark.usefixtures("one_thread")


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.data())
def test_balance_against_all_ways(costs, data):
    count = data.draw(st.integers(1, len(costs)))

    def largest(starts):
        return max(sum(costs[a:b]) for a, b in zip(starts, [*starts[1:], len(costs)], strict=True))

    starts = balance(costs, count)
    assert len(starts) == count and starts[0] == 0 and sorted(set(starts)) == starts
    ways = itertools.combinations(range(1, len(costs)), count - 1)
    assert largest(starts) == min(largest([0, *way]) for way in ways)


def test_costs():
    model = nn.Sequential(
        nn.Linear(6, 100), nn.BatchNorm1d(100), nn.Dropout(), nn.Linear(100, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    model[0].requires_grad_(False)
    model.eval()
    chain = split(model, ["0", "3", "5"])
    x = torch.randn(7, 6)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    costs = unit_costs(chain, x, "memory")
    # of the first, the batch norm's input, its mean and deviation, and the dropout's mask (a byte or a float each); of the
    # second, its input and the ReLU's output; of the third, its input
    assert costs[0] in [4 * (700 + 200) + 700 * size for size in (1, 4)]
    assert costs[1:] == [4 * (700 + 28), 4 * 28]
    assert all(c > 0 for c in unit_costs(chain, x, "time"))
    assert not model.training and not chain[0].training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[0].values(), strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])
    with pytest.raises(ValueError, match="1 to 3 groups, got 4"):
        balance([1.0] * 3, 4)


def test_blocks_are_balanced():
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(6)), nn.Linear(10, 60), nn.Linear(60, 10))
    assert split(model, 3, balance_by="parameters").names == ["0", "3", "6"]
    assert split(model, 2, balance_by="parameters", within=["0", "5", "7"]).names == ["0", "7"]
