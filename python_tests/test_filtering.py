"""Filters between units: what is dropped is what their definitions say, and training with them is exact and repeatable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from layerwise import (
    FeatureCache,
    Filter,
    KFilter,
    LayerwiseTrainer,
    LossFilter,
    Method,
    OptimizerSpec,
    bottom_up,
    k_redundant,
    sliding_windows,
)
from layerwise.filtering import losses_under


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return torch.from_numpy(X[:600]).float() / 16, torch.from_numpy(y[:600])


def batches_of(X, y, size):
    return list(zip(X.split(size), y.split(size), strict=True))


def join(batches):
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# ---- KFilter ----


def test_k_filter_drops_what_is_redundant_among_those_gathered(digits):
    X, y = digits
    filtered = list(KFilter(k=5, batch=300, cap=1.0, start_epoch=0).apply(iter(batches_of(X, y, 50)), 0))
    groups = [slice(0, 300), slice(300, 600)]
    kept = torch.cat([~k_redundant(X[g], y[g], 5) for g in groups])
    assert 0 < kept.sum() < 600
    assert torch.equal(join(filtered)[0], X[kept]) and torch.equal(join(filtered)[1], y[kept])
    assert all(len(t) == 50 for _, t in filtered[:-2])


def test_k_filter_waits_for_its_epoch(digits):
    stream = iter(batches_of(*digits, 50))
    assert KFilter(start_epoch=3).apply(stream, 2) is stream
    assert LossFilter(start_epoch=3).apply(stream, 2) is stream
    assert KFilter(start_epoch=3).apply(stream, 3) is not stream


def test_k_filter_up_to_its_cap(digits):
    X, y = digits

    def run():
        return join(list(KFilter(k=2, batch=600, cap=0.6, start_epoch=0).apply(iter(batches_of(X, y, 64)), 0)))[0]

    torch.manual_seed(0)
    first, other = run(), run()
    torch.manual_seed(0)
    assert torch.equal(run(), first)
    assert len(first) == len(other) == 240 and not torch.equal(first, other)
    redundant = k_redundant(X, y, 2)
    dropped = torch.tensor([not (first == x).all(1).any() for x in X])
    assert redundant[dropped].all()


def test_k_filter_looks_at_the_main_tensor_and_keeps_rows_together(digits):
    X, y = digits
    number = torch.arange(600)
    state = (number[:, None].float(), {"also": -number}, X.view(-1, 1, 8, 8))
    stream = iter([((state[0][i], {"also": state[1]["also"][i]}, state[2][i]), y[i]) for i in number.split(70)])
    out = list(KFilter(k=5, batch=600, cap=1.0, start_epoch=0).apply(stream, 0))
    numbers = torch.cat([s[0][:, 0] for s, _ in out]).long()
    assert torch.equal(numbers, (~k_redundant(X, y, 5)).nonzero()[:, 0])
    for (a, b, c), t in out:
        rows = a[:, 0].long()
        assert torch.equal(b["also"], -rows) and torch.equal(c.flatten(1), X[rows]) and torch.equal(t, y[rows])


def test_memory_is_bounded(digits):
    """No more than a group and the batch that ends it are taken before something comes out."""
    taken = []

    def source():
        for batch in batches_of(*digits, 50):
            taken.append(50)
            yield batch

    out = KFilter(k=20, batch=200, start_epoch=0).apply(source(), 0)
    came = 0
    for _, target in out:
        came += len(target)
        assert sum(taken) <= 600 and sum(taken) - came <= 2 * 200 + 50


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(9, 40), st.integers(0, 100))
def test_no_sample_is_lost_or_doubled(sizes, batch, seed):
    m = sum(sizes)
    generator = torch.Generator().manual_seed(seed)
    X, y = torch.arange(m).float()[:, None], torch.randint(2, (m,), generator=generator)
    stream = zip(X.split(sizes), y.split(sizes), strict=True)
    out = list(KFilter(k=8, batch=batch, cap=0.5, start_epoch=0).apply(iter(stream), 0))
    values = torch.cat([x for x, _ in out])[:, 0]
    assert torch.equal(values, values.unique())  # in order, each once
    assert torch.equal(torch.cat([t for _, t in out]), y[values.long()])
    assert len(values) >= m // 2
    lengths = [len(t) for _, t in out]
    assert all(n <= max(sizes) for n in lengths)
    assert len(lengths) < 3 or min(lengths) >= min(lengths[0] // 2, lengths[0])


# ---- LossFilter ----


def test_loss_filter_drops_the_lowest(digits):
    X, y = digits
    head = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10))
    head(X)  # statistics
    statistics = head[0].running_mean.clone()
    out = list(
        LossFilter(fraction=0.25, start_epoch=0, batch=600).apply(
            iter(batches_of(X, y, 50)), 0, losses_under(head.train(), None)
        )
    )
    with torch.no_grad():
        losses = F.cross_entropy(head.eval()(X), y, reduction="none")
    kept = losses.argsort()[150:].sort().values
    assert torch.equal(join(out)[0], X[kept]) and torch.equal(join(out)[1], y[kept])
    assert torch.equal(head[0].running_mean, statistics)
    assert [len(t) for _, t in out] == [50] * 9


# ---- in training ----


def make_trainer(method_options, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
        nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    settings = {"schedule": bottom_up(3, 4), "optimizer": OptimizerSpec("adam", 0.01), **method_options}
    method = Method("test", **settings)
    return LayerwiseTrainer(model, method, classes=10, spec=["0", "3", "5"], progress=False, **options)


def make_loader(digits):
    return DataLoader(TensorDataset(*digits), 50, shuffle=True)


@pytest.mark.parametrize(
    "options",
    [
        {"filtering": KFilter(k=3, batch=300, cap=0.4, start_epoch=2)},
        {"filtering": lambda unit: LossFilter(0.3, start_epoch=1, batch=200) if unit else None},
        {"filtering": KFilter(k=3, batch=300, cap=0.4, start_epoch=1), "schedule": bottom_up(3, 4, feed="cached")},
    ],
    ids=["k", "loss", "k from a cache"],
)
def test_training_is_filtered_and_resumes_exactly(digits, tmp_path, options):
    def run(**more):
        trainer = make_trainer(options, cache=FeatureCache(), **more)
        torch.manual_seed(1)
        return trainer

    whole = run()
    whole.fit(make_loader(digits))
    seen = {(row["first"], row["epoch"]): row["seen"] for row in whole.history}
    assert seen[0, 1] == seen[1, 1] == 1.0
    assert seen[2, 4] < 0.8 and seen[2, 4] >= 0.6

    def stop(trainer, rows):
        if (rows[0]["first"], rows[0]["epoch"]) in ((1, 3), (2, 2)) and not resumed:
            raise KeyboardInterrupt

    resumed = False
    interrupted = run(checkpoint=tmp_path / "c", callbacks=[stop])
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit(make_loader(digits))
    resumed = True
    again = run(checkpoint=tmp_path / "c", callbacks=[stop])
    torch.manual_seed(99)
    again.fit(make_loader(digits), resume=True)
    assert [{**r, "seconds": 0} for r in again.history] == [{**r, "seconds": 0} for r in whole.history]
    for a, b in zip(whole.chain.state_dict().values(), again.chain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_trainer_gives_the_head_below(digits):
    calls = []

    class Watch:
        equal_counts = True

        def apply(self, stream, epoch, loss_of=None):
            calls.append((loss_of is not None, epoch))
            for state, target in stream:
                if loss_of is not None:
                    head = trainer.trainings[(0, 0)].subnet.head
                    losses = F.cross_entropy(head(state), target, reduction="none")
                    assert torch.equal(loss_of(state, target), losses) and not losses.isnan().any()
                yield state, target

    assert isinstance(Watch(), Filter)
    trainer = make_trainer({"filtering": Watch(), "schedule": bottom_up(2, 1)})
    trainer.fit(make_loader(digits))
    assert calls == [(False, 0), (True, 0)]


# ---- bad input ----


def test_loss_filter_needs_a_head_below():
    with pytest.raises(ValueError, match=r"right below the window.*lambda unit: LossFilter"):
        make_trainer({"filtering": LossFilter()})
    overlapping = {"filtering": lambda unit: LossFilter(start_epoch=0) if unit else None}
    overlapping["schedule"] = sliding_windows(3, 1, size=2, overlap=1)  # its second window begins inside the first
    with pytest.raises(ValueError, match="right below the window"):
        make_trainer(overlapping)


def test_workers_need_equal_counts():
    with pytest.raises(ValueError, match="differing numbers of samples"):
        make_trainer({"filtering": KFilter()}, distributed="ddp")
    make_trainer({"filtering": lambda unit: LossFilter() if unit else None}, distributed="ddp")


def test_states_need_rows(digits):
    X, y = digits
    run = lambda state: list(KFilter(k=2, start_epoch=0).apply(iter([(state, y)]), 0))  # noqa: E731
    with pytest.raises(TypeError, match="a row for each of the 600 samples, got 8"):
        run((8, X))
    with pytest.raises(TypeError, match=r"got \(3,\)"):
        run((torch.zeros(3), X))


def test_bad_options(digits):
    X, y = digits
    with pytest.raises(ValueError, match="batch=20 is less than one batch of the loader, 50 samples"):
        list(KFilter(k=2, batch=20, start_epoch=0).apply(iter(batches_of(X, y, 50)), 0))
    with pytest.raises(ValueError, match="dropped all of the last 40 samples"):
        list(KFilter(k=2, batch=40, cap=1.0, start_epoch=0).apply(iter([(torch.rand(40, 2), torch.zeros(40))]), 0))
    for make in (
        lambda: KFilter(k=0),
        lambda: KFilter(k=10, batch=10),
        lambda: KFilter(cap=1.1),
        lambda: KFilter(start_epoch=-1),
        lambda: LossFilter(fraction=1.0),
        lambda: LossFilter(batch=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
