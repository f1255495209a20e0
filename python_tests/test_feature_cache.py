"""The feature cache: what is fed from it is what would have been computed, bit for bit."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from layerwise import (
    FeatureCache,
    LayerwiseTrainer,
    Method,
    OptimizerSpec,
    Regularisation,
    bottom_up,
    robin,
    sliding_windows,
    split,
)
from layerwise.feednet import Feednet

pytestmark = pytest.mark.filterwarnings("error")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
SCHEDULES = {
    "bottom up": bottom_up(4, 2, feed="cached"),
    "segments": sliding_windows(4, 2, size=2, overlap=1, feed="cached"),
    "robin": robin(4, 2, feed="cached"),
    "random robin": robin(4, 2, shuffle=True, feed="cached"),
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    X, y = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy(X[:100]).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y[:100]))


def make_model():
    """Four units with batch normalisation and dropout, one of which begins with an operation in place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3),
        nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


def make_loader(data, own=False, **options):
    generator = torch.Generator().manual_seed(5) if own else None
    return DataLoader(data, **{"batch_size": 32, "shuffle": True, "generator": generator, **options})


def make_trainer(schedule, cache, device="cpu", **options):
    method = Method(
        "test",
        schedule,
        optimizer=OptimizerSpec("adam", 0.01),
        regularisation=Regularisation(input_dropout=0.3),
    )
    return LayerwiseTrainer(
        make_model().to(device), method, classes=10, spec=["0", "4", "7", "11"], cache=cache, progress=False, **options
    )


def train(schedule, cache, loader, **options):
    trainer = make_trainer(schedule, cache, **options)
    torch.manual_seed(1)
    trainer.fit(loader)
    return state_of(trainer)


def state_of(trainer):
    heads = {f"{w}.{k}": v for w, t in trainer.trainings.items() for k, v in t.subnet.head.state_dict().items()}
    losses = {f"loss {i}": torch.tensor(row["loss"]) for i, row in enumerate(trainer.history)}
    return {k: v.clone() for k, v in {**trainer.chain.state_dict(), **heads, **losses}.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture
def feednet():
    chain = split(make_model(), ["0", "4", "7", "11"])
    for unit in chain:
        unit.freeze()
    return Feednet(chain, torch.device("cpu"))


def collect(stream):
    return [(state.clone(), target.clone()) for state, target in stream]


def assert_equal_batches(a, b):
    assert len(a) == len(b)
    for (x, y), (u, v) in zip(a, b, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


# ---- cached = recomputed ----


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_is_the_same_recorded_or_not(data, name):
    with pytest.warns(RuntimeWarning, match="do not fit: limit_bytes=0") as warned:
        recomputed = train(SCHEDULES[name], FeatureCache(limit_bytes=0), make_loader(data))
    assert len(warned) == 1
    for cache in (FeatureCache(), FeatureCache("disk")):
        assert_same(train(SCHEDULES[name], cache, make_loader(data)), recomputed)
        assert cache.nbytes > 0


@pytest.mark.parametrize("device", DEVICES)
def test_in_a_fixed_order_training_is_that_of_the_plain_feednet(data, device):
    schedule = SCHEDULES["bottom up"]
    plain = [type(stage)(stage.windows, stage.epochs) for stage in schedule]
    expected = train(plain, None, make_loader(data, True, shuffle=False), device=device)
    for where in ("memory", "disk", *(["pinned"] if device == "cuda" else [])):
        got = train(schedule, FeatureCache(where), make_loader(data, True, shuffle=False), device=device)
        assert_same(got, expected)


def test_training_and_loader_draw_apart(data):
    """A loader that draws between batches, from every generator, is read the same while training draws, too."""

    class Noisy:
        def __iter__(self):
            for _ in range(4):
                numbers = np.random.permutation(100)[:16]  # noqa: NPY002
                chosen = torch.randperm(100)[:16] if random.random() < 0.5 else torch.from_numpy(numbers)
                yield data[chosen]

    def run(**options):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        return train(SCHEDULES["bottom up"], FeatureCache(deterministic=True, **options), Noisy())

    with pytest.warns(RuntimeWarning, match="do not fit"):
        recomputed = run(limit_bytes=0)
    assert_same(run(), recomputed)


def test_tuples_and_layouts(feednet):
    """States of several tensors, one of which has its channels last, come back as they were."""
    for where in ("memory", "disk"):
        state = (
            torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
            torch.randn(4, 2).bfloat16(),
            torch.ones(4, 0),
        )
        cache = FeatureCache(where)
        feednet.advance = lambda s, first, stop: s
        batches = [(state, torch.arange(4))]
        list(cache.stream(feednet, batches, 1))
        ((got, target),) = cache.stream(feednet, batches, 1)
        assert isinstance(got, tuple) and torch.equal(target, torch.arange(4))
        for a, b in zip(got, state, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype and a is not b


# ---- what is computed ----


def count_calls(feednet, monkeypatch):
    calls = []
    advance = feednet.advance
    monkeypatch.setattr(
        feednet, "advance", lambda s, first, stop: (calls.append((first, stop)), advance(s, first, stop))[1]
    )
    return calls


def test_a_deeper_window_starts_from_the_deepest_recording(data, feednet, monkeypatch):
    loader, cache = make_loader(data, batch_size=50), FeatureCache()
    calls = count_calls(feednet, monkeypatch)
    first = collect(cache.stream(feednet, loader, 1))
    again = collect(cache.stream(feednet, loader, 1))
    third = collect(cache.stream(feednet, loader, 3))
    assert calls == [(0, 1), (0, 1), (1, 3), (1, 3)] and cache.boundaries == [1, 3]
    assert_equal_batches(first, again)
    assert_equal_batches(third, [(feednet.advance(x, 1, 3), y) for x, y in first])
    assert cache.nbytes == sum(x.nbytes + y.nbytes for x, y in first + third)


@pytest.mark.parametrize("change", ["weight", "buffer"])
def test_recordings_over_changed_units_are_dropped(data, feednet, change):
    loader, cache = make_loader(data), FeatureCache()
    for boundary in (1, 2, 3):
        list(cache.stream(feednet, loader, boundary))
    before = collect(cache.stream(feednet, loader, 2))
    unit = feednet.chain[1]
    tensor = next(
        t for n, t in unit.named_tensors() if n == {"weight": "4.1.weight", "buffer": "5.running_mean"}[change]
    )
    tensor.data.add_(0.1)  # behind autograd's back
    after = collect(cache.stream(feednet, loader, 2))
    assert cache.boundaries == [1, 2]
    first = collect(cache.stream(feednet, loader, 1))
    assert_equal_batches(after, [(feednet.advance(x, 1, 2), y) for x, y in first])
    assert not torch.equal(before[0][0], after[0][0])


def test_other_data_other_recordings(data, feednet):
    """Another loader, another transform, and data changed in place."""

    class Images(Dataset):
        def __init__(self):
            self.x, self.transform = data.tensors[0].clone(), None

        def __len__(self):
            return 100

        def __getitem__(self, i):
            return (self.transform(self.x[i]) if self.transform else self.x[i]), int(data.tensors[1][i])

    images = Images()
    cache, loader = FeatureCache(), make_loader(images, shuffle=False)
    expect = lambda: [(feednet.advance(x, 0, 1), y) for x, y in loader]  # noqa: E731
    seen = []
    for change in (lambda: None, lambda: setattr(images, "transform", torch.neg), lambda: images.x.add_(1)):
        change()
        seen.append(collect(cache.stream(feednet, loader, 1)))
        assert_equal_batches(seen[-1], expect())
    loader = make_loader(images, shuffle=False, batch_size=20)
    seen.append(collect(cache.stream(feednet, loader, 1)))
    assert_equal_batches(seen[-1], expect())
    assert len({len(s) * 1000 + float(s[0][0].sum()) for s in seen}) == 4


def test_batches_may_be_changed_in_place(data, feednet):
    loader = make_loader(data)
    for where in ("memory", "disk"):
        cache = FeatureCache(where)
        first = []
        for state, target in cache.stream(feednet, loader, 1):
            first.append((state.clone(), target.clone()))
            state.zero_(), target.zero_()
        for state, target in cache.stream(feednet, loader, 1):
            state.zero_(), target.zero_()
        assert_equal_batches(collect(cache.stream(feednet, loader, 1)), first)


def test_first_unit_and_order(data, feednet):
    """The first unit sees a new order every epoch, the others the same one, and each sample once."""
    loader, cache = make_loader(data), FeatureCache()
    a, b = (collect(cache.stream(feednet, loader, 0)) for _ in range(2))
    assert not torch.equal(a[0][1], b[0][1]) and cache.nbytes == 0
    a, b = (collect(cache.stream(feednet, loader, 1)) for _ in range(2))
    assert_equal_batches(a, b)
    assert torch.equal(torch.cat([y for _, y in a]).sort().values, data.tensors[1].sort().values)


# ---- the limit ----


def test_limit_evicts_what_was_used_longest_ago(data, feednet):
    loader = make_loader(data)
    sizes = {}
    for boundary in (1, 2, 3):
        with FeatureCache() as cache:
            list(cache.stream(feednet, loader, boundary))
            sizes[boundary] = cache.nbytes
        assert cache.nbytes == 0
    assert sizes[1] > sizes[2] > sizes[3]
    cache = FeatureCache(limit_bytes=sizes[1] + sizes[2])
    for boundary in (1, 2, 3):
        list(cache.stream(feednet, loader, boundary))
        assert cache.nbytes <= cache.limit_bytes
    assert cache.boundaries == [2, 3]
    cache = FeatureCache(limit_bytes=sizes[1] + sizes[3])  # two do not fit together
    for boundary in (1, 2, 3):
        if boundary == 2:
            with pytest.warns(RuntimeWarning, match="enter unit 2 do not fit"):
                list(cache.stream(feednet, loader, boundary))
        else:
            list(cache.stream(feednet, loader, boundary))
    assert cache.boundaries == [1, 3]


def test_limit_without_a_known_length(data, feednet):
    """What cannot be foreseen is found out on the way, and no byte too many is kept."""
    batches = [(data.tensors[0][i : i + 20], data.tensors[1][i : i + 20]) for i in range(0, 100, 20)]

    class Stream:
        def __iter__(self):
            return iter(batches)

    cache = FeatureCache(limit_bytes=50_000)
    with pytest.warns(RuntimeWarning, match="do not fit"):
        got = []
        for batch in cache.stream(feednet, Stream(), 1):
            assert cache.nbytes <= cache.limit_bytes
            got.append(batch)
    assert cache.nbytes == 0
    assert_equal_batches(got, [(feednet.advance(x, 0, 1), y) for x, y in batches])
    assert_equal_batches(collect(cache.stream(feednet, Stream(), 1)), got)  # without another warning


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=12),
    st.integers(0, 300_000),
    st.booleans(),
)
def test_any_sequence_of_windows_and_changes(data, steps, limit, on_disk):
    chain = split(make_model(), ["0", "4", "7", "11"])
    for unit in chain:
        unit.freeze()
    feednet = Feednet(chain, torch.device("cpu"))
    loader = make_loader(data, shuffle=False, batch_size=40)
    cache = FeatureCache("disk" if on_disk else "memory", limit)
    cache._warned.add("room")
    for boundary, changed in steps:
        got = collect(cache.stream(feednet, loader, boundary))
        assert_equal_batches(got, [(feednet.advance(x, 0, boundary), y) for x, y in loader])
        assert cache.nbytes <= limit
        if changed < 4:
            next(chain[changed].parameters()).data.mul_(1.01)


# ---- the disk ----


def test_nothing_is_left_on_the_disk(data, tmp_path, monkeypatch):
    def fail(trainer, rows):
        if rows[0]["first"] == 2:
            raise KeyboardInterrupt

    cache = FeatureCache("disk", directory=tmp_path)
    trainer = make_trainer(SCHEDULES["bottom up"], cache, callbacks=[fail])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(make_loader(data))
    assert cache.nbytes > 0 and list(tmp_path.iterdir()) == []
    recordings = list(cache._recordings.values())
    cache.close()
    assert cache.nbytes == 0 and all(r._file.closed for r in recordings)


def test_an_unfinished_pass_is_not_recorded(data, feednet, tmp_path):
    cache, loader = FeatureCache("disk", directory=tmp_path), make_loader(data)
    stream = cache.stream(feednet, loader, 1)
    first = next(stream)[0].clone()
    assert cache.nbytes > 0
    del stream
    gc.collect()
    assert cache.nbytes == 0 and cache.boundaries == []
    left = cache.stream(feednet, loader, 1)
    next(left)
    got = collect(cache.stream(feednet, loader, 1))  # while the other is still there
    assert torch.equal(got[0][0], first)
    assert len(list(left)) == 3 and cache.boundaries == [1]
    assert_equal_batches(collect(cache.stream(feednet, loader, 1)), got)


def test_a_full_disk(data, feednet, monkeypatch):
    cache, loader = FeatureCache("disk"), make_loader(data)
    expected = collect(cache.stream(feednet, loader, 1))
    cache.close()

    class Full:
        closed = False

        def seek(self, offset):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            self.closed = True

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: Full())
    with pytest.warns(RuntimeWarning, match="No space left"):
        got = collect(cache.stream(feednet, loader, 1))
    assert_equal_batches(got, expected)
    assert cache.nbytes == 0


def test_a_file_cut_short(data, feednet):
    cache, loader = FeatureCache("disk"), make_loader(data)
    list(cache.stream(feednet, loader, 1))
    cache._recordings[1]._file.truncate(1000)
    with pytest.raises(OSError, match="cut short"):
        list(cache.stream(feednet, loader, 1))


# ---- augmentation ----


class Augmented(Dataset):
    def __init__(self, data, change):
        self.data, self.change = data, change

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        return self.change(x), y


OWN = np.random.default_rng(0)
AUGMENTATIONS = {
    "torch": lambda x: x + torch.rand(()),
    "numpy": lambda x: x * np.float32(np.random.rand()),  # noqa: NPY002
    "python": lambda x: x.flip(2) if random.random() < 0.1 else x,
    "generator of its own": lambda x: x + float(OWN.random()),
}


@pytest.mark.parametrize("kind", [*AUGMENTATIONS, "collate_fn"])
def test_augmentation_is_found_out(data, feednet, kind):
    if kind == "collate_fn":
        mix = lambda batch: (torch.rand(()) * torch.stack([x for x, _ in batch]), torch.tensor([y for _, y in batch]))  # noqa: E731
        loader = make_loader(data, collate_fn=mix)
    else:
        loader = make_loader(Augmented(data, AUGMENTATIONS[kind]))
    cache = FeatureCache()
    before = torch.get_rng_state()
    with pytest.warns(RuntimeWarning, match="deterministic=True") as warned:
        a, b = (collect(cache.stream(feednet, loader, 1)) for _ in range(2))
    assert len(warned) == 1 and cache.nbytes == 0
    assert not torch.equal(a[0][1], b[0][1])  # read as usual, in a new order
    if kind != "generator of its own":
        torch.set_rng_state(before), random.seed(0), np.random.seed(0)  # noqa: NPY002
        got = collect(cache.stream(feednet, loader, 1))
        torch.set_rng_state(before), random.seed(0), np.random.seed(0)  # noqa: NPY002
        assert_equal_batches(got, collect(feednet.stream(loader, 1)))
    declared = FeatureCache(deterministic=True)
    a, b = (collect(declared.stream(feednet, loader, 1)) for _ in range(2))
    assert_equal_batches(a, b)


def test_looking_for_augmentation_draws_nothing(data, feednet):
    loader = make_loader(Augmented(data, AUGMENTATIONS["torch"]), own=True)
    state, own = torch.get_rng_state(), loader.generator.get_state()
    with pytest.warns(RuntimeWarning):
        FeatureCache()._look_at_source(feednet, loader, [loader.generator])
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(loader.generator.get_state(), own)


def test_other_loaders(data, feednet):
    class Numbers(IterableDataset):
        def __iter__(self):
            return (data[i] for i in range(100))

    batches = [data[i : i + 25] for i in range(0, 100, 25)]
    for loader in (
        DataLoader(Numbers(), batch_size=25),
        batches,
        DataLoader(data, batch_size=None, sampler=[[1, 2], [3, 4]]),
    ):
        cache = FeatureCache()
        a, b = (collect(cache.stream(feednet, loader, 1)) for _ in range(2))
        assert cache.boundaries == [1]
        assert_equal_batches(a, b)
    with pytest.raises(ValueError, match="got an iterator"):
        list(FeatureCache().stream(feednet, iter(batches), 1))


# ---- resuming ----


@pytest.mark.parametrize("name", ["segments", "random robin"])
@pytest.mark.parametrize("shuffle_batches", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["global generator", "own generator"])
def test_resume_is_exact(data, tmp_path, name, shuffle_batches, own):
    schedule = SCHEDULES[name]
    make_cache = lambda: FeatureCache(shuffle_batches=shuffle_batches)  # noqa: E731
    whole = train(schedule, make_cache(), make_loader(data, own))
    path = tmp_path / "checkpoint.pt"

    def stop_after(count):
        def callback(trainer, rows):
            nonlocal count
            count -= 1
            if count < 0:
                raise KeyboardInterrupt

        return callback

    for attempt in range(10):
        trainer = make_trainer(schedule, make_cache(), checkpoint=path, callbacks=[stop_after(1)])
        torch.manual_seed(1 + attempt)  # a new process knows nothing of the old one's generators
        try:
            trainer.fit(make_loader(data, own), resume=attempt > 0)
            break
        except KeyboardInterrupt:
            pass
    assert attempt >= 5
    assert_same(state_of(trainer), whole)


def test_order_of_batches(data, feednet):
    loader, cache = make_loader(data), FeatureCache(shuffle_batches=True)
    torch.manual_seed(3)
    passes = [collect(cache.stream(feednet, loader, 1)) for _ in range(3)]
    keys = [[float(x.sum()) for x, _ in batches] for batches in passes]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(keys[2])
    assert len({tuple(k) for k in keys}) > 1
    full = FeatureCache(limit_bytes=0, shuffle_batches=True)
    with pytest.raises(RuntimeError, match="shuffle_batches: the features that enter unit 1 do not fit"):
        next(full.stream(feednet, loader, 1))


# ---- bad input ----


def test_bad_options(data, feednet, tmp_path):
    with pytest.raises(ValueError, match="one of \\('memory', 'pinned', 'disk'\\), got 'ram'"):
        FeatureCache("ram")
    with pytest.raises(ValueError, match="limit_bytes"):
        FeatureCache(limit_bytes=-1)
    with pytest.raises(ValueError, match="goes with where='disk'"):
        FeatureCache(directory=tmp_path)
    with pytest.raises(FileNotFoundError, match="make it first"):
        FeatureCache("disk", directory=tmp_path / "none")
    with pytest.raises(ValueError, match="use where='memory'"):
        list(FeatureCache("pinned").stream(feednet, make_loader(data), 1))
