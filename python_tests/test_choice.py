"""Which way mode 'auto' takes, on made-up clocks."""

import pytest

from weight_compression.distributed.choice import BETWEEN_TRIALS, TRIED, Choice


def run(seconds, steps, *, start=0, predicted=0.0, others=None, decisions=None, until=0.0):
    """Modes of all steps; `seconds` are a step's by mode, or a function of the step's number that returns them."""
    at = seconds if callable(seconds) else lambda step: seconds

    def agree(found):
        return (
            found if others is None else [max(mine, theirs) for mine, theirs in zip(found, others(found), strict=True)]
        )

    choice = Choice(start, agree, lambda: predicted, [] if decisions is None else decisions, until)
    modes = []
    for step in range(steps):
        modes.append(choice.mode_of(step))
        choice.took(modes[-1], at(step)[modes[-1]])
    return modes, choice.decisions


@pytest.mark.parametrize("best", ["raw", "bf16", "coded"])
def test_the_soonest_is_kept(best):
    modes, _ = run({"raw": 2.0, "bf16": 2.0, "coded": 2.0} | {best: 1.0}, 40)
    assert modes[: 3 * TRIED] == ["raw"] * TRIED + ["bf16"] * TRIED + ["coded"] * TRIED
    assert set(modes[3 * TRIED :]) == {best}


def test_coded_is_not_tried_where_coding_alone_takes_longer_than_raw():
    modes, _ = run({"raw": 2.0, "bf16": 3.0, "coded": 100.0}, 400, predicted=2.0)
    assert "coded" not in modes
    assert set(modes[2 * TRIED : BETWEEN_TRIALS]) == {"raw"}


def test_nothing_is_tried_before_the_start():
    modes, _ = run({"raw": 3.0, "bf16": 2.0, "coded": 1.0}, 40, start=7)
    assert modes[: 7 + TRIED] == ["raw"] * (7 + TRIED)
    assert modes[-1] == "coded"


def test_the_first_step_of_a_trial_does_not_count():
    """It makes groups and threads, and touches memory for the first time."""
    modes, _ = run(lambda step: {"raw": 3.0, "bf16": 2.0, "coded": 50.0 if step == 2 * TRIED else 1.0}, 40)
    assert modes[-1] == "coded"


def test_the_slowest_rank_decides():
    def other_rank(found):  # the same but for bf16, which is slow there
        return [5.0 if second == 2.0 else second for second in found]

    modes, _ = run({"raw": 3.0, "bf16": 2.0, "coded": 4.0}, 40, others=other_rank)
    assert modes[-1] == "raw"


def test_a_link_that_changes_is_noticed():
    modes, _ = run(
        lambda step: {"raw": 9.0, "bf16": 5.0, "coded": 1.0} if step < 100 else {"raw": 0.5, "bf16": 0.6, "coded": 1.0},
        5000,
    )
    assert modes[50] == "coded"
    assert modes[-1] == "raw"


@pytest.mark.parametrize("slow", [1.1, 3.0, 10.0])
def test_trials_cost_little(slow):
    seconds = {"raw": 1.0, "bf16": slow, "coded": slow}
    steps = 20_000
    modes, _ = run(seconds, steps)
    first = 3 * TRIED
    spent = sum(seconds[mode] for mode in modes[first:])
    assert modes[first:].count("coded") > 0
    assert spent <= 1.011 * (steps - first)


def test_decisions_say_when_the_way_changed():
    modes, decisions = run({"raw": 9.0, "bf16": 5.0, "coded": 1.0}, 60, start=2)
    assert decisions == [(0, "raw"), (2 + TRIED, "bf16"), (2 + 2 * TRIED, "coded")]
    replayed, same = run({"raw": 1.0, "bf16": 5.0, "coded": 9.0}, 60, decisions=list(decisions), until=float("inf"))
    assert replayed == modes
    assert same == decisions


def test_decisions_up_to_an_iteration_are_followed_and_new_ones_made_from_there():
    decisions = [(0, "raw"), (3, "coded")]
    modes, after = run({"raw": 1.0, "bf16": 5.0, "coded": 9.0}, 40, decisions=decisions, until=10)
    assert modes[:10] == ["raw"] * 3 + ["coded"] * 7
    assert modes[10 : 10 + 2 * TRIED] == ["raw"] * TRIED + ["bf16"] * TRIED
    assert modes[-1] == "raw"
    assert after[2] == (10, "raw")
