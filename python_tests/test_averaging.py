"""CompressedModelAverager in real gloo processes: agreement, exactness, options, resumption and failures."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.distributed.tensor import Shard, distribute_tensor

import weight_compression as wc
from ranks import run_ranks
from weight_compression.distributed import CompressedModelAverager, PeerError, messages, plot_stats

RESUMED = [("auto", False, False), ("auto", True, True), ("difference", True, False), ("weights", False, True)]


def nesterov(weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.7, momentum=0.9, nesterov=True)


def make_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(150, 60), nn.BatchNorm1d(60), nn.Tanh(), nn.Linear(60, 4))


@torch.no_grad()
def wander(parameters: Iterable[torch.Tensor], generator: torch.Generator, size: float = 0.01) -> None:
    """As local training does: every rank elsewhere."""
    for p in parameters:
        p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=size)


def generator_of(rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + rank)


def gathered(x: torch.Tensor) -> list[torch.Tensor]:
    out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(out, x.detach().contiguous())
    return out


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- what runs in the ranks ----


def distances_from_means(rank: int, code: str, outer: bool, rounds: int = 4) -> dict:
    """The largest distance of averages from float64 means, by round, over the largest bin that the codec may use."""
    model, generator = make_model(7), generator_of(rank)
    averager = CompressedModelAverager(1, code=code, outer_optimizer=nesterov if outer else None)
    averager.broadcast_parameters(model.named_parameters())
    found = {"distances": [], "errors": [], "codes": []}
    for _ in range(rounds):
        started = {name: p.detach().clone() for name, p in model.named_parameters()}
        wander(model.parameters(), generator, 0.003)
        everyones = {name: gathered(p) for name, p in model.named_parameters()}
        averager.average_parameters(model.named_parameters())
        found["codes"].append(dict(averager.codes))
        by_name, errors = {}, {}
        for name, p in model.named_parameters():
            mean = torch.stack(everyones[name]).double().mean(0)
            coded = [x - started[name] if averager.codes[name] == "difference" else x for x in everyones[name]]
            # 2^5 levels at least, of the range of what is coded. Half a bin of what is sent, and of the mean of it; with
            # error feedback the rests of the last round come on top: twice that.
            widest = max(float(x.max() - x.min()) for x in coded)
            errors[name] = float((p.detach().double() - mean).abs().max())
            by_name[name] = errors[name] / (2 * widest / 2**5)
        found["distances"].append(by_name)
        found["errors"].append(errors)
    return found | {"state": state_of(model), "stats": averager.stats()}


def plain_steps_of_post_local_sgd(rank: int) -> dict:
    model, generator = make_model(3), generator_of(rank)
    averager = CompressedModelAverager(period=3, warmup_steps=2)
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), averager)
    equal = []
    for _ in range(9):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        equal.append(all(torch.equal(*gathered(p)[:2]) for p in model.parameters()))
    saved = optimizer.state_dict()["step"]
    averager.step = 0
    optimizer.load_state_dict(optimizer.state_dict() | {"step": saved})
    return {"equal": equal, "step": averager.step, "names": list(averager.codes)}


def buffers_of_ranks(rank: int) -> dict:
    model = make_model(5)
    norm = model[1]
    norm.register_buffer("mask", torch.tensor([float("-inf"), 0.1, 3.0]))
    norm.register_buffer("cache", torch.tensor(float(rank)), persistent=False)
    norm.register_buffer("flags", torch.tensor([rank == 1, False]))
    norm.running_var.copy_(torch.linspace(1e-9, 1e3, 60) * (1 + rank))
    norm.num_batches_tracked.fill_(10 + rank)
    variances = gathered(norm.running_var)
    averager = CompressedModelAverager(1, buffers=model)
    for _ in range(3):
        averager.average_parameters(model.parameters())
    chosen = torch.tensor(float(rank))
    other = CompressedModelAverager(1, buffers=[chosen, chosen])
    other.average_parameters([])
    buffers = {name: x.clone() for name, x in norm.named_buffers()}
    return buffers | {"expected": torch.stack(variances).double().mean(0).float(), "chosen": chosen.clone()}


def kinds_of_parameters(rank: int) -> dict:
    """Shared, frozen, frozen later, of several dtypes, empty, not contiguous, without a gradient."""
    torch.manual_seed(rank)
    shared = nn.Parameter(torch.randn(64, 32))
    parameters = {
        "shared": shared,
        "again": shared,
        "frozen": nn.Parameter(torch.full((1500,), float(rank)), requires_grad=False),
        "later": nn.Parameter(torch.randn(1500)),
        "half": nn.Parameter(torch.randn(40, 50).bfloat16()),
        "double": nn.Parameter(torch.randn(2000).double()),
        "float16": nn.Parameter(torch.randn(2000).half()),
        "empty": nn.Parameter(torch.empty(0, 3)),
        "turned": nn.Parameter(torch.randn(40, 30).t()),
        "channels last": nn.Parameter(torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last)),
    }
    means = {name: torch.stack(gathered(p)).double().mean(0) for name, p in parameters.items() if p.numel()}
    kept = parameters["turned"].stride(), parameters["channels last"].data_ptr()
    averager = CompressedModelAverager(1, code="difference", error_feedback=False)
    averager.average_parameters(parameters.items())  # exact: nothing is agreed
    found = {
        "exact": {name: float((parameters[name].detach().double() - mean).abs().max()) for name, mean in means.items()}
    }
    found["first codes"] = averager.codes
    wander(parameters.values(), generator_of(rank))
    parameters["later"].requires_grad_(False)
    averager.average_parameters(parameters.items())
    found["second codes"] = averager.codes
    equal = {name: torch.equal(*gathered(p)[:2]) for name, p in parameters.items()}
    wander(parameters.values(), generator_of(rank))
    averager.average_parameters(parameters.items())
    found["third codes"] = averager.codes
    found["kept"] = kept == (parameters["turned"].stride(), parameters["channels last"].data_ptr())
    groups = [{"params": [torch.zeros(3)]}, {"params": [torch.ones(2)], "param_names": ["ones"]}]
    by_groups = CompressedModelAverager(1)
    by_groups.average_parameters(groups)
    return found | {"equal": equal, "groups": by_groups.codes}


def small_steps_in_bfloat16(rank: int) -> torch.Tensor:
    """Each averaging moves weights by a quarter of their last bit; agreed weights remember."""
    weights = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    averager = CompressedModelAverager(1, code="difference")
    averager.broadcast_parameters([weights])
    for step in range(8):
        with torch.no_grad():
            weights.add_(2.0**-7 if rank == step % 2 else 0.0)  # half of it: 2^-8, the last bit of 1 is 2^-7
        averager.average_parameters([weights])
    return weights.detach()


def one_outer_step(rank: int) -> dict:
    """Against algorithm 1 of DiLoCo by hand, with a lossless mean: fewer than 1,024 elements."""
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(100))
    by_hand = weights.detach().clone()
    averager = CompressedModelAverager(1, outer_optimizer=nesterov)
    averager.broadcast_parameters([weights])
    buffer, generator = torch.zeros(100), generator_of(rank)
    for _ in range(3):
        wander([weights], generator, 0.1)
        gradient = by_hand - torch.stack(gathered(weights)).double().mean(0).float()
        buffer = 0.9 * buffer + gradient
        by_hand = by_hand - 0.7 * (gradient + 0.9 * buffer)
        averager.average_parameters([weights])
    return {"distance": float((weights.detach() - by_hand).abs().max()), "rate": averager.outer.param_groups[0]["lr"]}


def resumed(rank: int, code: str, outer: bool, by_pickle: bool) -> list[dict]:
    """Two rounds, then two more: gone on with, and by an averager and a model made anew."""
    make_outer = nesterov if outer else None
    model, generator = make_model(11), generator_of(rank)
    averager = CompressedModelAverager(2, 1, code=code, buffers=model, outer_optimizer=make_outer)

    def go_on(model: nn.Module, averager: CompressedModelAverager, steps: int) -> None:
        for _ in range(steps):
            wander(model.parameters(), generator)
            averager.average_parameters(model.named_parameters())

    go_on(model, averager, 6)  # not at an averaging: every rank is elsewhere
    saved_model, random = copy.deepcopy(model.state_dict()), generator.get_state()
    if by_pickle:
        saved = pickle.dumps(averager)
    else:
        saved = pickle.dumps(averager.state_dict())
    go_on(model, averager, 5)
    again = make_model(12)
    again.load_state_dict(saved_model)
    generator.set_state(random)
    if by_pickle:
        other = pickle.loads(saved)
        try:
            other.average_parameters(again.named_parameters())
        except ValueError as error:
            assert "pickling leaves it out" in str(error)
        else:
            raise AssertionError("expected an error without buffers")
        other.buffers = again
        if outer:
            other.outer_optimizer = make_outer
    else:
        other = CompressedModelAverager(2, 1, code=code, buffers=again, outer_optimizer=make_outer)
        other.load_state_dict(pickle.loads(saved))
    go_on(again, other, 5)
    return [state_of(model), state_of(again), {"step": torch.tensor([averager.step, other.step])}]


def not_finite(rank: int) -> dict:
    model, generator = make_model(2), generator_of(rank)
    averager = CompressedModelAverager(1, buffers=model)
    averager.broadcast_parameters(model.named_parameters())
    wander(model.parameters(), generator)
    averager.average_parameters(model.named_parameters())
    wander(model.parameters(), generator)
    if rank == 1:
        with torch.no_grad():
            model[0].weight[3, 3] = float("inf")
        model[1].num_batches_tracked += 5
    before = state_of(model)
    with pytest.raises(wc.NonFiniteError, match=r"mean of 0\.weight$"):
        averager.average_parameters(model.named_parameters())
    unchanged, step = same(before, state_of(model)), averager.step
    with torch.no_grad():
        model[0].weight[3, 3] = 0.0
    averager.average_parameters(model.named_parameters())
    return {"unchanged": unchanged, "step": step, "state": state_of(model)}


def wrong_calls(rank: int) -> None:
    averager = CompressedModelAverager(1)
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))
    averager.average_parameters([first, second])
    with pytest.raises(ValueError, match="expected 2 parameters, as before, got 1"):
        averager.average_parameters([first])
    with pytest.raises(ValueError, match=r"expected parameter 0 of shape \(3,\) as number 0"):
        averager.average_parameters([second, first])
    with pytest.raises(TypeError, match="got a tensor"):
        averager.average_parameters(first)
    with pytest.raises(TypeError, match="parameters, names with parameters, or parameter groups"):
        averager.average_parameters(["weight"])
    with pytest.raises(TypeError, match=r"float32.*got Tensor of torch\.int64"):
        CompressedModelAverager(1).average_parameters([torch.zeros(3, dtype=torch.int64)])
    sharded = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(TypeError, match=r"got DTensor of torch\.float32"):
        CompressedModelAverager(1).average_parameters([sharded])
    with pytest.raises(TypeError, match="expected dense tensors of real numbers"):
        CompressedModelAverager(1, buffers=[torch.zeros(3, dtype=torch.complex64)]).average_parameters([])
    with_outer = CompressedModelAverager(1, outer_optimizer=nesterov)
    for _ in range(2):
        with_outer.average_parameters([first, second])
    with pytest.raises(ValueError, match="without an outer optimiser"):
        averager.load_state_dict(with_outer.state_dict())
    with pytest.raises(ValueError, match="period: expected a whole number of at least 1, got 0"):
        CompressedModelAverager(0)
    with pytest.raises(ValueError, match="warmup_steps: expected a whole number of at least 0, got -1"):
        CompressedModelAverager(1, warmup_steps=-1)
    with pytest.raises(ValueError, match="code: expected 'auto', 'difference' or 'weights', got 'both'"):
        CompressedModelAverager(1, code="both")
    with pytest.raises(ValueError, match="keep_steps: expected at least 1, got 0"):
        CompressedModelAverager(1, keep_steps=0)


def parameters_that_come_later(rank: int) -> dict:
    """A group that is added while an outer optimiser is at work, and what it is resumed from."""
    first, second = nn.Parameter(torch.zeros(2000)), nn.Parameter(torch.ones(1500))
    generator = generator_of(rank)
    averager = CompressedModelAverager(1, outer_optimizer=nesterov)
    for given in ([first], [first], [first, second], [first, second]):
        wander(given, generator)
        averager.average_parameters(given)
    other = CompressedModelAverager(1, outer_optimizer=nesterov)
    other.load_state_dict(averager.state_dict())
    copies = [nn.Parameter(x.detach().clone()) for x in (first, second)]
    random = generator.get_state()
    for one, given in ((averager, [first, second]), (other, copies)):
        generator.set_state(random)
        wander(given, generator)
        one.average_parameters(given)
    groups = [len(group["params"]) for group in other.outer.param_groups]
    return {"groups": groups, "same": all(map(torch.equal, [first, second], copies)), "first": first.detach()}


def change_of_code(rank: int) -> list[str]:
    """'auto' goes by the range of the last movement: of everyone's, so that all ranks find the same."""
    weights = nn.Parameter(torch.linspace(-1, 1, 2000))
    averager = CompressedModelAverager(1)
    codes = []
    for movement in (0.0, 0.1, 10.0, 0.1, 0.1):
        wander([weights], generator_of(rank), movement)
        if movement == 10.0:  # what was agreed is negligible afterwards
            with torch.no_grad():
                weights.mul_(1 if rank else 3)
        averager.average_parameters([weights])
        codes += averager.codes.values()
    return codes


def steady_drift(rank: int, error_feedback: bool) -> float:
    """How far 16 averagings end from where the same small movements lead, of a range that one element sets."""
    weights = nn.Parameter(torch.zeros(2000))
    averager = CompressedModelAverager(1, code="difference", error_feedback=error_feedback)
    averager.broadcast_parameters([weights])
    with torch.no_grad():
        for _ in range(16):
            weights.add_(0.004)
            weights[0] += 1.0
            averager.average_parameters([weights])
    return float((weights.detach()[1:] - 16 * 0.004).abs().max())


def failed_rank(rank: int) -> dict:
    model, generator = make_model(2), generator_of(rank)
    averager = CompressedModelAverager(1, buffers=model)
    averager.broadcast_parameters(model.named_parameters())
    wander(model.parameters(), generator)
    before, agreed = state_of(model), averager.state_dict()["tensors"]
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(messages, "pack", _no_memory)
        with pytest.raises(MemoryError if rank == 1 else PeerError):
            averager.average_parameters(model.named_parameters())
    still = averager.state_dict()["tensors"]
    return {
        "unchanged": same(before, state_of(model)),
        "agreed": all(torch.equal(a["agreed"], b["agreed"]) for a, b in zip(agreed, still, strict=True)),
        "step": averager.step,
    }


def _no_memory(*_: object) -> None:
    raise MemoryError


def two_ranks(rank: int) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {
            "distances": {
                (code, outer): distances_from_means(rank, code, outer)
                for code in ("auto", "difference", "weights")
                for outer in (False, True)
            },
            "post local SGD": plain_steps_of_post_local_sgd(rank),
            "kinds": kinds_of_parameters(rank),
            "bfloat16": small_steps_in_bfloat16(rank),
            "outer": one_outer_step(rank),
            "resumed": {
                (code, outer, by_pickle): resumed(rank, code, outer, by_pickle) for code, outer, by_pickle in RESUMED
            },
            "later": parameters_that_come_later(rank),
            "change": change_of_code(rank),
            "drift": {error_feedback: steady_drift(rank, error_feedback) for error_feedback in (False, True)},
            "wrong": wrong_calls(rank),
            "failed": failed_rank(rank),  # the last one: the group's channel does not outlive it
        }


def three_ranks(rank: int) -> dict:
    found = {
        "distances": {("auto", False): distances_from_means(rank, "auto", False)},
        "buffers": buffers_of_ranks(rank),
        "not finite": not_finite(rank),
        "broadcast": broadcast_from(rank),
    }
    pair = dist.new_group([0, 2])
    model, generator = make_model(rank), generator_of(rank)
    before = state_of(model)
    averager = CompressedModelAverager(1, process_group=pair)
    averager.broadcast_parameters(model.parameters(), src=1)
    wander(model.parameters(), generator)
    averager.average_parameters(model.parameters())
    wandered = state_of(model)
    found["group"] = {"state": wandered, "before": before, "step": averager.step}
    return found


def broadcast_from(rank: int) -> dict:
    model = make_model(rank)
    model[3].bias.requires_grad_(False)
    model[1].num_batches_tracked += rank
    averager = CompressedModelAverager(1, buffers=model)
    averager.broadcast_parameters(model.parameters(), src=1)
    return state_of(model)


# ---- what they have to show ----


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return run_ranks(two_ranks, 2)


@pytest.fixture(scope="module")
def three() -> list[dict]:
    return run_ranks(three_ranks, 3)


@pytest.mark.parametrize("code", ["auto", "difference", "weights"])
def test_averages_are_near_the_mean_and_the_same_on_all_ranks(two, three, code):
    for found in (two, three):
        if (code, False) not in found[0]["distances"]:
            continue
        ranks = [of_rank["distances"][code, False] for of_rank in found]
        assert all(same(ranks[0]["state"], other["state"]) for other in ranks[1:])
        for by_name, errors in zip(ranks[0]["distances"], ranks[0]["errors"], strict=True):
            assert 0 < by_name["0.weight"] < 1  # coded, of 9,000 elements
            assert max(by_name.values()) < 1
            assert errors["3.bias"] < 2.0**-22  # 4 elements are sent exactly; they are below 1


@pytest.mark.parametrize("code", ["auto", "difference", "weights"])
def test_an_outer_optimiser_leaves_all_ranks_the_same(two, code):
    first, second = (of_rank["distances"][code, True] for of_rank in two)
    assert same(first["state"], second["state"])
    assert not same(first["state"], two[0]["distances"][code, False]["state"])


def test_code_is_what_was_asked_for(two):
    for code in ("difference", "weights"):
        for codes in two[0]["distances"][code, False]["codes"]:
            assert set(codes.values()) == {code}
    assert [r["change"] for r in two] == [["weights", "difference", "difference", "weights", "difference"]] * 2


def test_differences_are_more_exact_for_no_more_bits(two):
    """A period moves weights over a seventh of their range, and so do the bins' widths differ."""
    errors, bits = {}, {}
    for code in ("difference", "weights"):
        found = two[0]["distances"][code, False]
        errors[code] = max(by_name["0.weight"] for by_name in found["errors"])
        bits[code] = max(s["layers"]["0.weight"]["bits_per_weight"] for s in found["stats"]["by_step"])
    assert errors["difference"] < errors["weights"] / 2
    assert bits["difference"] < bits["weights"] + 1


def test_periods_count_as_in_post_local_sgd(two):
    for found in two:
        # Warm-up of two steps, then steps 2, 5 and 8.
        assert found["post local SGD"]["equal"] == [False, False, True, False, False, True, False, False, True]
        assert found["post local SGD"]["step"] == 9
        assert found["post local SGD"]["names"] == [f"parameter {i}" for i in range(6)]


def test_buffers_are_averaged_exactly(three):
    for found in (of_rank["buffers"] for of_rank in three):
        torch.testing.assert_close(found["running_var"], found["expected"], rtol=2e-7, atol=0)
        assert bool((found["running_var"] > 0).all())
        assert int(found["num_batches_tracked"]) == 12
        assert found["mask"].equal(torch.tensor([float("-inf"), 0.1, 3.0]))  # does not drift
        assert found["flags"].tolist() == [True, False]
        assert float(found["chosen"]) == 1.0
    assert [float(of_rank["buffers"]["cache"]) for of_rank in three] == [0.0, 1.0, 2.0]  # not persistent


def test_kinds_of_parameters(two):
    for found in (of_rank["kinds"] for of_rank in two):
        rounding = {"half": 2.0**-8, "float16": 2.0**-11}  # half a last place, of values of up to 5
        for name, distance in found["exact"].items():
            if name != "frozen":
                assert distance <= 4 * rounding.get(name, 2.0**-24), name
        everything = {"shared", "later", "half", "double", "float16", "turned", "channels last"}
        assert found["first codes"] == dict.fromkeys(everything, "exact")
        assert found["second codes"] == dict.fromkeys(everything, "difference")
        assert found["third codes"] == dict.fromkeys(everything - {"later"}, "difference")
        assert [name for name, equal in found["equal"].items() if not equal] == ["frozen"]
        assert found["kept"]
        assert found["groups"] == {}  # these do not require grad
    assert [of_rank["kinds"]["exact"]["frozen"] for of_rank in two] == [0.5, 0.5]  # left alone


def test_error_feedback_keeps_errors_from_adding_up(two):
    for found in two:
        # Nearly all values are in one of 32 bins of width 1 / 32 or a little more, whose centre is what arrives: 16 times
        # the same error without feedback. With it, what worker and owner have not sent yet: two bins at most.
        assert found["drift"][False] > 0.1
        assert found["drift"][True] < 2 * 1.1 / 32


def test_agreed_weights_are_finer_than_bfloat16(two):
    # Eight averagings of 2^-8 each. In bfloat16 alone, 1 + 2^-8 is 1 again.
    for found in two:
        assert found["bfloat16"].tolist() == [1 + 2.0**-5] * 8


def test_outer_steps_are_those_of_diloco(two):
    for found in two:
        assert found["outer"]["distance"] <= 2.0**-20  # three steps' rounding of values of up to 4
        assert found["outer"]["rate"] == 0.7


@pytest.mark.parametrize("case", RESUMED, ids=["auto", "pickled outer", "outer", "pickled weights"])
def test_a_resumed_run_is_the_same_bit_by_bit(two, case):
    for found in two:
        straight, again, steps = found["resumed"][case]
        assert same(straight, again)
        assert steps["step"].tolist() == [11, 11]


def test_parameters_may_come_later(two):
    for found in two:
        assert found["later"]["groups"] == [1, 1] and found["later"]["same"]
    assert torch.equal(two[0]["later"]["first"], two[1]["later"]["first"])


def test_nan_and_infinity_raise_on_all_ranks_and_change_nothing(three):
    for found in (of_rank["not finite"] for of_rank in three):
        assert found["unchanged"] and found["step"] == 1
        assert same(found["state"], three[0]["not finite"]["state"])
        assert all(bool(x.isfinite().all()) for x in found["state"].values())


def test_a_failed_rank_changes_nothing(two):
    for found in two:
        assert found["failed"] == {"unchanged": True, "agreed": True, "step": 0}


def test_broadcast_is_exact_and_of_everything(three):
    expected = make_model(1).state_dict()
    expected["1.num_batches_tracked"] += 1
    for found in three:
        assert same(found["broadcast"], expected)


def test_ranks_outside_the_group_take_no_part(three):
    first, outside, last = (of_rank["group"] for of_rank in three)
    assert same(first["state"], last["state"])
    assert [of_rank["group"]["step"] for of_rank in three] == [1, 1, 1]
    generator = generator_of(1)
    model = make_model(1)
    wander(model.parameters(), generator)
    assert same(outside["state"], model.state_dict())


def test_stats_count_what_was_sent(two, tmp_path):
    for code in ("difference", "weights"):
        stats = two[0]["distances"][code, False]["stats"]
        assert stats["steps"] == 4
        numel = sum(p.numel() for p in make_model(0).parameters())
        assert stats["bytes_before"] == 4 * 4 * numel
        assert 3 < stats["ratio"] < 32
        assert set(stats["by_step"][0]["layers"]) == {name for name, _ in make_model(0).named_parameters()}
        plot_stats(stats, tmp_path / "stats.png")
        assert (tmp_path / "stats.png").read_bytes()[:4] == b"\x89PNG"


def test_a_process_group_is_needed():
    with pytest.raises(ValueError, match="init_process_group"):
        CompressedModelAverager(1)
