"""Probing of whole networks: the same samples for every unit, and no trace left behind."""

from __future__ import annotations

import csv
import io

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerwise import LayerwiseTrainer, greedy, split
from layerwise.probes import (
    CNNSeparability,
    ConditionalEntropy,
    KRedundancy,
    LeastSquaresDistance,
    LinearSeparability,
    ProbeCallback,
    ProbeTable,
    PureEntropy,
    StableRank,
    k_redundancy,
    least_squares_distance,
    linear_separability,
    probe,
    project_pca,
    pure_entropy,
    selection_entropy,
    stable_rank,
)
from layerwise.probes.probing import _Draw


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


NAMES = ["0", "4", "8"]


@pytest.fixture(scope="module")
def data():
    X, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(X[:300] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y[:300]))


def loader(data, **options):
    return DataLoader(data, batch_size=64, **options)


@torch.no_grad()
def outputs(model, X):
    """The input, and what leaves each of the units 0, 4 and 8."""
    model.eval()
    return [X, model[:4](X), model[:8](X), model(X)]


def test_values_are_those_of_the_measures(data):
    model = network()
    X, y = data.tensors
    measures = (
        "lsd", LeastSquaresDistance(intercept=True, pool=None), "conditional_entropy", KRedundancy(k=(1, 5)), "pca",
        "linear_separability", CNNSeparability(p=2, width=4, epochs=1), PureEntropy(samples=100), StableRank(),
    )  # fmt: skip
    test = TensorDataset(X[:100].flip(3), y[:100])
    table = probe(model, loader(data), measures=measures, test_loader=loader(test), max_samples=5000, spec=NAMES)
    assert [row["layer"] for row in table.rows] == [0, 1, 2, 3]
    assert [row["name"] for row in table.rows] == ["input", *NAMES]
    assert [row["shape"] for row in table.rows] == ["1x8x8", "6x4x4", "128", "10"]
    assert (table.streamed, table.sampled) == (300, 300)
    test_outputs = outputs(model, test.tensors[0])
    for row, Z, Z_test in zip(table.rows, outputs(model, X), test_outputs, strict=True):
        assert row["lsd"] == pytest.approx(least_squares_distance(Z, y), abs=1e-6)
        expected = least_squares_distance(Z, y, intercept=True, pool=None)
        assert row["lsd_intercept"] == pytest.approx(expected, abs=1e-5)
        for k in (1, 5):
            assert row[f"k_redundancy_{k}"] == pytest.approx(k_redundancy(Z, y, k), abs=0.01)
            if row["layer"] == 0:
                others = NearestNeighbors(n_neighbors=k).fit(X.flatten(1)).kneighbors(return_distance=False)
                expected = (y.numpy()[others] == y.numpy()[:, None]).all(1).mean()
                assert row[f"k_redundancy_{k}"] == pytest.approx(expected, abs=0.02)  # ties
        found = linear_separability(Z, y, Z_test, test.tensors[1])
        assert row["linear_separability"] == pytest.approx(found.test, abs=0.021)
        assert row["linear_separability_train"] == pytest.approx(found.train, abs=0.021)
        assert 0 < row["cnn2_separability"] <= 1
        assert row["pure_entropy"] == pytest.approx(pure_entropy(Z[:100], y[:100]), abs=0.8)  # of others
        projection = project_pca(Z, y)
        assert row["pca_share"] == pytest.approx(projection.share, abs=1e-6)
        assert table.projections[row["layer"]].points.square().sum() == pytest.approx(
            projection.points.square().sum().item(), rel=1e-5
        )
        if row["layer"]:
            assert row["conditional_entropy"] == pytest.approx(selection_entropy(Z, y).mean, abs=1e-6)
    assert table.rows[0]["conditional_entropy"] is None and table.rows[0]["stable_rank"] is None
    assert table.column("stable_rank")[1:] == [stable_rank(model[i].weight) for i in (0, 4, 8)]


def test_every_unit_sees_the_same_drawn_samples(data):
    """A network that passes its input on has the input's values everywhere, in any order of the loader."""
    model = nn.Sequential(*(nn.Conv2d(1, 1, 1, bias=False) for _ in range(3)))
    for layer in model:
        nn.init.ones_(layer.weight)
    table = probe(model, loader(data, shuffle=True), measures=("k_redundancy", "pure_entropy", "pca"), max_samples=80)
    assert table.sampled == 80
    for measure in table.trends:
        assert len(set(table.column(measure))) == 1
    assert all(torch.equal(p.labels, table.projections[0].labels) for p in table.projections.values())


def test_draws_are_random_and_repeatable(data):
    table = [
        probe(network(), loader(data), measures="pca", max_samples=50, seed=seed, include_input=False, spec=NAMES)
        for seed in (0, 0, 1)
    ]
    assert [row["layer"] for row in table[0].rows] == [1, 2, 3]
    labels = [t.projections[1].labels for t in table]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])


def test_reservoir_draws_evenly():
    """20 of 100 numbers in batches of 7, 500 times: each number 100 times, give or take 5 standard deviations."""
    counts = torch.zeros(100)
    first = torch.zeros(100)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        draw = _Draw(20, generator)
        for part in torch.arange(100).split(7):
            draw.add((part[:, None].float(), part))
        inputs = torch.cat(draw.batches()).flatten()
        assert len(draw) == 20 and torch.equal(inputs.long(), draw.labels) and len(set(inputs.tolist())) == 20
        counts[draw.labels] += 1
        first[draw.labels[:10]] += 1  # any part of a draw is a draw
    for total, expected in ((counts, 100), (first, 50)):
        assert (total - expected).abs().max() < 5 * (expected * 0.8) ** 0.5


def test_nothing_changes(data):
    model = network()
    model.train()
    model[1].eval()
    chain = split(model, NAMES)
    chain[0].freeze()
    chain[1].train()
    shuffled = loader(data, shuffle=True, generator=torch.Generator().manual_seed(3))
    modes = [m.training for m in model.modules()] + [m.training for unit in chain for m in unit.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    before = torch.get_rng_state(), shuffled.generator.get_state()
    probe(chain, shuffled, measures=("lsd", "k_redundancy", CNNSeparability(width=2, epochs=1)), test_loader=shuffled)
    assert modes == [m.training for m in model.modules()] + [m.training for unit in chain for m in unit.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert wanted == [p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    assert torch.equal(before[0], torch.get_rng_state()) and torch.equal(before[1], shuffled.generator.get_state())


def test_a_failed_probe_leaves_no_trace_either(data):
    chain = split(network(), NAMES)
    chain.train()
    with pytest.raises(ValueError, match="k"):
        probe(chain, loader(data), measures=KRedundancy(k=500))
    assert all(m.training for unit in chain for m in unit.modules())


def test_states_of_several_tensors_and_integer_inputs():
    """A cut through a residual block, behind an embedding: the input makes no row, and heads' tensors are measured."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)

        def forward(self, x):
            x = self.embed(x)
            return x + self.b(torch.relu(self.a(x)))

    model = Residual().eval()
    X, y = torch.randint(5, (40, 3)), torch.randint(2, (40,))
    table = probe(model, [(X[:30], y[:30]), (X[30:], y[30:])], measures=("lsd", "pca"), spec=["embed", "a", "b"])
    assert [row["layer"] for row in table.rows] == [1, 2, 3] and table.rows[0]["shape"] == "3x4"
    assert table.rows[2]["lsd"] == pytest.approx(least_squares_distance(model(X), y), abs=1e-5)
    hidden = torch.relu(model.a(model.embed(X)))
    assert table.rows[1]["lsd"] == pytest.approx(least_squares_distance(hidden, y), abs=1e-5)


def test_weights_need_one_batch_only():
    taken = []

    def batches():
        for i in range(5):
            taken.append(i)
            yield torch.randn(2, 1, 8, 8), torch.tensor([0, 1])

    table = probe(network(), batches(), measures="stable_rank", spec=NAMES)
    assert taken == [0] and table.streamed == table.sampled == 0
    assert table.column("stable_rank")[0] is None and all(r >= 1 for r in table.column("stable_rank")[1:])


# ------------------------------------------------------------------------------------------------------------- tables


def example_table():
    values = [(0, "input", 0.5, 0.2), (1, "a", 0.4, None), (2, "b", 0.45, 0.1), (3, "c", 0.1, 0.3)]
    rows = [{"layer": u, "name": n, "shape": "4", "lsd": lsd, "k_redundancy_1": k} for u, n, lsd, k in values]
    return ProbeTable(rows, {"lsd": -1, "k_redundancy_1": 1})


def test_violations_are_found_and_shown():
    table = example_table()
    found = table.violations()
    assert [(v.measure, v.layer, v.name, v.before, v.value) for v in found] == [
        ("lsd", 2, "b", 0.4, 0.45),
        ("k_redundancy_1", 2, "b", 0.2, 0.1),
    ]
    assert "lsd rises at layer 2 (b): 0.4 to 0.45" in str(table) and "k_redundancy_1 falls" in str(table)
    assert [v.measure for v in table.violations(tolerance=0.06)] == ["k_redundancy_1"]
    table.trends["lsd"] = 0
    assert len(table.violations()) == 1
    table.rows[2]["k_redundancy_1"] = float("nan")
    assert table.violations() == []


def test_csv(tmp_path):
    table = example_table()
    text = table.to_csv(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text() == text
    read = list(csv.DictReader(io.StringIO(text)))
    assert [r["lsd"] for r in read] == ["0.5", "0.4", "0.45", "0.1"] and read[1]["k_redundancy_1"] == ""
    with pytest.raises(KeyError, match="no measure 'pca'"):
        table.column("pca")


# ----------------------------------------------------------------------------------------------------------- callback


def test_a_trainer_trains_the_same_with_a_probe(data):
    states = []
    for probed in (False, True):
        model = network(seed=1)
        shuffled = loader(data, shuffle=True)
        watch = ProbeCallback(loader(data), measures=("lsd", "k_redundancy"), every=2, max_samples=100)
        torch.manual_seed(5)
        trainer = LayerwiseTrainer(model, greedy(1, epochs=2), classes=10, spec=NAMES, callbacks=[watch] * probed)
        trainer.fit(shuffled)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert list(watch.tables) == [2, 4, 6]
    losses = [row["loss"] for row in trainer.history]
    assert [s["loss"] for s in watch.scalars.values()] == losses[1::2]
    assert len(watch.rows) == 12 and watch.rows[0]["epoch"] == 2 and "k_redundancy_10" in watch.rows[0]
    assert watch.tables[2].rows[0] == watch.tables[6].rows[0]  # the input, and the samples, stay
    assert watch.tables[2].rows[1]["lsd"] == watch.tables[6].rows[1]["lsd"]  # trained before
    assert watch.tables[2].rows[2]["lsd"] != watch.tables[6].rows[2]["lsd"]


def test_a_loop_of_ones_own(data):
    model = network()
    watch = ProbeCallback(loader(data), measures="lsd", spec=NAMES, include_input=False)
    watch.record(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for epoch in range(2):
        model.train()
        for x, y in loader(data):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        table = watch.record(model, loss=loss.item())
        assert model.training and watch.tables[epoch + 1] is table
    assert list(watch.tables) == [0, 1, 2] and watch.scalars[0] == {}
    assert watch.tables[2].rows[2]["lsd"] < watch.tables[0].rows[2]["lsd"]
    assert watch.rows[0]["loss"] is None and watch.rows[-1]["loss"] == loss.item()
    assert watch.to_csv().splitlines()[0] == "epoch,layer,name,shape,lsd,loss"
    other = watch.record(network(seed=9), epoch=7)  # another network is cut anew
    assert other.rows[0] != watch.tables[2].rows[0]
    with pytest.raises(ValueError, match="recorded already"):
        watch.record(model, epoch=7)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_measures(data):
    for measures, match in [
        ("lds", "unknown measure 'lds'; there are lsd"),
        ((), "at least one"),
        (("lsd", LeastSquaresDistance(pool=None)), "column 'lsd'"),
        (("k_redundancy", KRedundancy(k=(5, 10))), "column 'k_redundancy_10'"),
        (("lsd", LinearSeparability()), "LinearSeparability.*test_loader"),
    ]:
        with pytest.raises(ValueError, match=match):
            probe(network(), loader(data), measures=measures)
    for k in ((), (5, 5), 0):
        with pytest.raises(ValueError, match="k: expected distinct"):
            KRedundancy(k=k)
    with pytest.raises(ValueError, match="swish"):
        ConditionalEntropy(threshold="swish")


def test_bad_loaders(data):
    X, y = data.tensors
    for bad, match in [
        ([], "at least one batch"),
        ([(X[:4], y[:3])], "4|3 labels|one label"),
        ([(X[:4], y[:4].float())], "class numbers"),
        ([(X[:4], torch.nn.functional.one_hot(y[:4]))], "class numbers"),
        ([(X[:4] / 0, y[:4])], "finite"),
    ]:
        with pytest.raises(ValueError, match=match):
            probe(network(), bad, measures=("lsd", "pca"))
    with pytest.raises(TypeError, match="pairs"):
        probe(network(), [X[:4]], measures="lsd")
    with pytest.raises(ValueError, match="test_loader: expected at least one"):
        probe(network(), loader(data), measures="linear_separability", test_loader=[])
    with pytest.raises(ValueError, match="max_samples"):
        probe(network(), loader(data), max_samples=0)
    sizes = [(torch.randn(2, 1, n, n), torch.tensor([0, 1])) for n in (8, 12)]
    with pytest.raises(ValueError, match="one shape"):
        probe(nn.Sequential(nn.Conv2d(1, 2, 3)), sizes, measures="pca")


def test_bad_callbacks(data):
    with pytest.raises(ValueError, match="every"):
        ProbeCallback(loader(data), every=0)
    with pytest.raises(TypeError, match="no options epochs"):
        ProbeCallback(loader(data), epochs=3)
