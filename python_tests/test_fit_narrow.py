"""platonic.fit_narrow against the pinv-based NumPy reference, then invariants, then hostile input."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from platonic import _ops, narrow, reference
from platonic.narrow import fit_narrow
from platonic_core import _C

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not (torch.cuda.is_available() and _C.has_cuda), reason="needs a CUDA device and a CUDA build"
        ),
    ),
]


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    """Every instruction set that this machine has."""
    _C.limit_isa(request.param)
    if _C.isa() != request.param:
        _C.limit_isa("")
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.limit_isa("")


def draws_of(seed: int, widths: list[int], n_tries: int, k: int) -> list[np.ndarray]:
    """The documented stream of fit_narrow."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return [rng.standard_normal((n_tries, 1 + a + k, b)) for a, b in pairwise(widths)]


def data_of(seed: int, m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((m, n)) * 10.0 ** rng.uniform(-2, 2, n) + rng.uniform(-5, 5, n)
    spread = np.where(X.std(0) > 0, X.std(0), 1.0)
    return X, np.sin((X - X.mean(0)) / spread @ rng.standard_normal((n, k)) * 0.7)


def bytes_of(net: narrow.NarrowNetwork) -> list[bytes]:
    arrays = [*net.weights, *net.biases, net.coef, net.intercept, net.lsd, net.jitter, net.winners, net.representation]
    return [np.ascontiguousarray(a).tobytes() for a in arrays]


def assert_same_fit(net: narrow.NarrowNetwork, wanted: dict, rtol: float) -> None:
    assert list(net.winners) == wanted["winners"]
    for got, want in zip([*net.weights, *net.biases], [*wanted["weights"], *wanted["biases"]], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())
    np.testing.assert_allclose(net.lsd, wanted["lsd"], rtol=rtol)
    scale = np.abs(wanted["representation"]).max()
    np.testing.assert_allclose(net.representation, wanted["representation"], rtol=0, atol=rtol * scale)


# Gram matrices square the condition number: weights agree to about cond(Z)^2 epsilon. The data below have standardised
# condition numbers up to some 100 in the layers tried, so 1e-9 leaves two digits and would miss nothing real.
RTOL = 1e-9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scaling", ["relative", "absolute"])
@pytest.mark.parametrize("activation", sorted(_ops.ACTIVATIONS))
@pytest.mark.parametrize(("k", "n_tries", "l2", "weighted"), [(1, 1, 0.0, False), (3, 3, 1e-3, True)])
def test_agrees_with_the_reference(activation, scaling, k, n_tries, l2, weighted, device):
    # identity layers have rank n: with more units than inputs the read-out would be a matter of rounding
    widths = [5, 5, 4, 3] if activation == "identity" else [5, 7, 4, 9]
    X, Y = data_of(1, 301, widths[0], k)
    X = (X - X.mean(0)) / X.std(0)
    weight = np.random.default_rng(2).uniform(0, 2, len(X)) if weighted else None
    options = {"activation": activation, "alpha": 0.5, "beta": 2.0, "l2": l2, "bias_scale": 0.7}
    wanted = reference.fit_narrow(
        X, Y, draws_of(3, widths, n_tries, k), relative=scaling == "relative", weight=weight, **options
    )
    net = fit_narrow(
        torch.from_numpy(X).to(device), Y, widths[1:], n_tries=n_tries, scaling=scaling, sample_weight=weight,
        random_state=3, **options,
    )  # fmt: skip
    assert all(torch.is_tensor(w) and w.device.type == device for w in net.weights)
    as_numpy = {name: getattr(net, name).cpu().numpy() for name in ("lsd", "winners", "representation")}
    net = narrow.NarrowNetwork(
        [w.cpu().numpy() for w in net.weights], [b.cpu().numpy() for b in net.biases], None, None,
        as_numpy["lsd"], None, as_numpy["winners"], as_numpy["representation"], activation,
    )  # fmt: skip
    assert_same_fit(net, wanted, RTOL)


@pytest.mark.parametrize("m", [1, 2, 31, 32, 33, 127, 128, 129, 511, 513, 1200])
def test_row_counts_around_tile_boundaries(m, isa):
    X, Y = data_of(m, m, 3, 2)
    widths = [3, 4, 2]
    wanted = reference.fit_narrow(X, Y, draws_of(0, widths, 2, 2), l2=0.1, alpha=0.6, beta=2.0)
    net = fit_narrow(X, Y, widths[1:], n_tries=2, l2=0.1, alpha=0.6, beta=2.0, random_state=0)
    assert net.representation.shape == (m, 2)
    np.testing.assert_allclose(net.lsd, wanted["lsd"], rtol=RTOL, atol=1e-14)
    np.testing.assert_allclose(net.representation, wanted["representation"], rtol=0, atol=RTOL)


@pytest.mark.parametrize("widths", [[1, 1, 2, 3], [4, 5, 6, 7], [8, 13, 17, 12], [64, 64, 31, 64]])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_widths_around_tile_boundaries(widths, k, isa):
    rng = np.random.default_rng(k)
    X = rng.standard_normal((300, widths[0]))
    Y = np.tanh(X @ rng.standard_normal((widths[0], k)))
    weight = rng.uniform(0, 2, 300)
    options = {"activation": "tanh", "alpha": 0.8, "beta": 2.0, "l2": 1e-3}  # beta = 1: two terms may cancel
    wanted = reference.fit_narrow(X, Y, draws_of(7, widths, 1, k), weight=weight, **options)
    net = fit_narrow(X, Y, widths[1:], sample_weight=weight, random_state=7, **options)
    assert_same_fit(net, wanted, RTOL)


def test_instruction_sets_agree():
    X, Y = data_of(0, 600, 4, 2)
    nets = []
    for name in ("scalar", "avx2", "avx512"):
        _C.limit_isa(name)
        nets.append(fit_narrow(X, Y, [6] * 4, n_tries=2, alpha=0.5, random_state=1))
        _C.limit_isa("")
    for net in nets[1:]:
        np.testing.assert_allclose(net.representation, nets[0].representation, rtol=0, atol=RTOL)


@pytest.mark.parametrize("n_tries", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_results_do_not_depend_on_the_thread_count(n_tries, weighted):
    X, Y = data_of(5, 3001, 3, 1)
    weight = np.random.default_rng(0).uniform(0, 1, 3001) if weighted else None
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            net = fit_narrow(X, Y, [9] * 30, n_tries=n_tries, alpha=0.7, sample_weight=weight, random_state=2)
            results.append(bytes_of(net))
    finally:
        torch.set_num_threads(before)
    assert results.count(results[0]) == len(results)


@pytest.mark.parametrize("n_tries", [1, 3])
@pytest.mark.parametrize("scaling", ["relative", "absolute"])
def test_segments_equal_one_call(n_tries, scaling, monkeypatch):
    X, Y = data_of(5, 900, 2, 2)
    options = {"n_tries": n_tries, "scaling": scaling, "alpha": 0.3, "random_state": 4}
    whole = fit_narrow(X, Y, [5, 9, 3] * 10, **options)
    monkeypatch.setattr(narrow, "_SEGMENT_DRAWS", 300)
    parts = fit_narrow(X, Y, [5, 9, 3] * 10, **options)
    assert bytes_of(parts) == bytes_of(whole)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 300),
    n=st.integers(1, 6),
    k=st.integers(1, 4),
    widths=st.lists(st.integers(1, 10), min_size=1, max_size=4),
    n_tries=st.integers(1, 4),
    activation=st.sampled_from(sorted(_ops.ACTIVATIONS)),
    seed=st.integers(0, 2**31),
)
def test_the_returned_network_reproduces_its_own_numbers(m, n, k, widths, n_tries, activation, seed):
    """Plain forward pass: representation, LSD and read-out follow from weights, biases, coef and intercept."""
    X, Y = data_of(seed, m, n, k)
    # beta = 1 could cancel the two terms of a unit over a single column, leaving rounding for a signal
    net = fit_narrow(X, Y, widths, n_tries=n_tries, activation=activation, beta=2.0, l2=1e-6, random_state=seed)
    Z = X
    for W, b in zip(net.weights, net.biases, strict=True):
        Z = reference._ACTIVATIONS[activation](Z @ W + b)
    # a layer's weights undo the spread of its input, here down to 1e-2 of the inputs' size
    size = max(1.0, *(float(np.abs(W).max()) for W in net.weights))
    np.testing.assert_allclose(net.representation, Z, rtol=0, atol=1e-13 * size ** len(widths))
    if size < 1e3:
        prediction = net.predict(X)
        np.testing.assert_allclose(prediction, Z @ net.coef + net.intercept, rtol=0, atol=1e-9 * np.abs(net.coef).max())
        assert net.lsd.min() >= 0
        np.testing.assert_allclose(net.lsd[-1], np.mean(np.sum((Y - prediction) ** 2, 1)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scaling", ["relative", "absolute"])
def test_weights_equal_repetition(scaling):
    X, Y = data_of(0, 200, 3, 1)
    weight = np.random.default_rng(1).integers(0, 4, 200)
    options = {"alpha": 0.4, "scaling": scaling, "random_state": 0, "n_tries": 3, "l2": 0.01}
    weighted = fit_narrow(X, Y, [5, 5], sample_weight=weight, **options)
    repeated = fit_narrow(np.repeat(X, weight, 0), np.repeat(Y, weight, 0), [5, 5], **options)
    np.testing.assert_allclose(weighted.lsd, repeated.lsd, rtol=RTOL)
    np.testing.assert_allclose(weighted.representation.repeat(weight, 0), repeated.representation, atol=1e-8)


def test_relative_scaling_ignores_units():
    """Powers of two change no digit, so the fit of rescaled data is the same network."""
    X, Y = data_of(0, 400, 3, 1)
    base = fit_narrow(X, Y, [6] * 5, alpha=0.5, l2=1e-6, random_state=0)
    scaled = fit_narrow(X * np.array([2.0**20, 2.0**-20, 1.0]), Y, [6] * 5, alpha=0.5, l2=1e-6, random_state=0)
    np.testing.assert_allclose(scaled.representation, base.representation, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scaled.lsd, base.lsd, rtol=1e-10)


def test_more_tries_never_score_worse_in_the_first_layer():
    X, Y = data_of(0, 400, 3, 1)
    P = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 1 + 3 + 1, 6)))
    z, shift = narrow._pack(torch.from_numpy(X), 6, None)
    targets, y_stats = narrow._pack_targets(torch.from_numpy(Y), None)

    def first(draws):
        args = (z, shift, targets, y_stats, draws.flatten(), 400, [3, 6], len(draws), "celu")
        out = _ops.fit_narrow(*args, 1.0, 1.0, 1.0, 0.0, 1e-14, True, False)
        return float(out[4][1]), int(out[6][0])

    singles = [first(P[t : t + 1])[0] for t in range(8)]
    assert first(P) == (min(singles), int(np.argmin(singles)))


def test_deep_narrow_network_on_the_sine_is_finite_and_fits():
    x = np.linspace(-1, 1, 1000)
    net = fit_narrow(x[:, None], np.sin(2 * np.pi * x), [16] * 2000, n_tries=2, alpha=0.5, beta=3.0, random_state=0)
    assert np.isfinite(net.lsd).all()
    assert net.lsd.min() < 1e-4


def test_float32_input_is_computed_in_float64():
    X, Y = data_of(0, 300, 3, 1)
    X32 = X.astype(np.float32)
    assert bytes_of(fit_narrow(X32, Y, [5] * 3, random_state=0)) == bytes_of(
        fit_narrow(X32.astype(np.float64), Y, [5] * 3, random_state=0)
    )


# ---- rank-deficient and constant columns ----


@pytest.mark.parametrize("device", DEVICES)
def test_duplicate_columns_are_reported_and_fit_as_well_as_one(device):
    X, Y = data_of(0, 500, 3, 1)
    doubled = torch.from_numpy(np.hstack([X, X[:, :1]])).to(device)
    net = fit_narrow(doubled, Y, [5], alpha=0.5, random_state=0)
    assert float(net.jitter[0]) > 0 and net.n_jittered >= 1
    lsd = reference.ridge_readout(X, Y, 0.0, np.ones(500))[2]
    # jitter s acts like ridge: it costs at most s |x|^2 with |x|^2 <= |Y|^2 / (smallest live eigenvalue)
    assert float(net.lsd[0]) == pytest.approx(lsd, rel=1e-10)


def test_no_jitter_where_none_is_needed():
    X, Y = data_of(0, 500, 3, 1)
    assert fit_narrow(X, Y, [5] * 5, random_state=0).n_jittered == 0


@pytest.mark.parametrize("scaling", ["relative", "absolute"])
@pytest.mark.parametrize("constant", [0.0, 1.0, 1e8, 0.1])
def test_constant_columns_take_no_part(scaling, constant):
    X, Y = data_of(0, 300, 3, 2)
    with_constant = np.insert(X, 1, constant, axis=1)
    net = fit_narrow(
        with_constant, Y, [6], scaling=scaling, alpha=1e-3 if scaling == "absolute" else 1.0, random_state=0
    )
    assert np.isfinite(net.representation).all() and net.n_jittered == 0
    assert net.lsd[0] == pytest.approx(reference.ridge_readout(X, Y, 0.0, np.ones(300))[2], rel=1e-9)
    if scaling == "relative":
        assert not net.weights[0][1].any()


def test_constant_data_and_constant_targets():
    net = fit_narrow(np.ones((50, 2)), np.full(50, 3.0), [4, 4], random_state=0)
    np.testing.assert_array_equal(net.lsd, 0.0)
    np.testing.assert_allclose(net.predict(np.ones((2, 2))), 3.0)


def test_zero_weight_rows_change_nothing():
    X, Y = data_of(0, 300, 3, 1)
    X[7], weight = 1e6, np.ones(300)
    weight[7] = 0
    net = fit_narrow(X, Y, [5], alpha=0.5, l2=1e-3, activation="tanh", sample_weight=weight, random_state=0)
    rest = fit_narrow(
        np.delete(X, 7, 0), np.delete(Y, 7, 0), [5], alpha=0.5, l2=1e-3, activation="tanh", random_state=0
    )
    np.testing.assert_allclose(net.lsd, rest.lsd, rtol=1e-6)


# ---- errors ----


@pytest.mark.parametrize("n_tries", [1, 3])
def test_overflow_names_the_layer(n_tries, monkeypatch):
    monkeypatch.setattr(narrow, "_SEGMENT_DRAWS", 2000)
    x = np.linspace(-1, 1, 300)
    with pytest.raises(FloatingPointError, match=r"layer \d+ of the network .* not finite") as raised:
        fit_narrow(x[:, None], x, [16] * 2000, alpha=2.0, scaling="absolute", n_tries=n_tries, random_state=0)
    layer = int(str(raised.value).split()[1])
    shorter = fit_narrow(
        x[:, None], x, [16] * (layer - 1), alpha=2.0, scaling="absolute", n_tries=n_tries, random_state=0
    )
    assert np.isfinite(shorter.representation).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.ones((5, 2, 2))}, "shape"),
        ({"X": np.ones((4, 2))}, "same m"),
        ({"X": np.ones((0, 2)), "Y": np.ones(0)}, "m >= 1"),
        ({"X": np.ones((5, 65))}, "64 columns"),
        ({"Y": np.ones((5, 65))}, "64 columns"),
        ({"X": np.full((5, 2), np.nan)}, "X contains NaN"),
        ({"Y": np.full(5, np.inf)}, "Y contains NaN"),
        ({"widths": []}, "at least one width"),
        ({"widths": [3, 65]}, "from 1 to 64"),
        ({"widths": [0]}, "from 1 to 64"),
        ({"widths": [2.5]}, "whole numbers"),
        ({"activation": "gelu"}, "activation must be one of"),
        ({"scaling": "none"}, "scaling must be"),
        ({"n_tries": 0}, "n_tries"),
        ({"l2": -1.0}, "l2"),
        ({"alpha": np.nan}, "alpha"),
        ({"sample_weight": -np.ones(5)}, "non-negative"),
        ({"sample_weight": np.zeros(5)}, "positive sum"),
        ({"sample_weight": np.ones(4)}, "sample_weight of shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"X": np.random.default_rng(0).standard_normal((5, 2)), "Y": np.arange(5.0), "widths": [3]} | change
    with pytest.raises(ValueError, match=message):
        fit_narrow(**arguments)


def _op_arguments(device: str = "cpu") -> list:
    X, Y = data_of(0, 150, 3, 2)
    X, Y = torch.from_numpy(X).to(device), torch.from_numpy(Y).to(device)
    z, shift = narrow._pack(X, 5, None)
    targets, y_stats = narrow._pack_targets(Y, None)
    normals = torch.from_numpy(np.concatenate([d.ravel() for d in draws_of(0, [3, 5, 2], 2, 2)])).to(device)
    options = ["celu", 0.5, 1.0, 1.0, 0.0, 1e-14, True, False]
    return [z, shift, targets, y_stats, normals, 150, [3, 5, 2], 2, *options]


@pytest.mark.parametrize("device", DEVICES)
def test_op_registration(device):
    torch.library.opcheck(_ops.fit_narrow, tuple(_op_arguments(device)))


def test_op_leaves_its_inputs_alone():
    arguments = _op_arguments()
    before = [a.clone() for a in arguments[:5]]
    _ops.fit_narrow(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments[:5], before, strict=True))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, lambda z: z.float(), "^z: "),
        (0, lambda z: z.transpose(1, 2).contiguous().transpose(1, 2), "^z: "),
        (0, lambda z: z[:, :, ::2], "^z: "),
        (1, lambda s: s[:1].expand(5), "^shift: "),
        (2, lambda t: t[:1], "^targets: "),
        (4, lambda p: p[:-1], "^normals: "),
        (5, lambda m: 0, "rows >= 1"),
        (5, lambda m: 300, "^z: "),
        (6, lambda w: [3, 6], "widths from 1 to 5"),
        (6, lambda w: [], "widths from 1"),
        (7, lambda t: 0, "n_tries >= 1"),
        (8, lambda a: "gelu", "activation"),
    ],
)
def test_op_rejects_what_the_kernel_cannot_take(index, value, message):
    arguments = _op_arguments()
    arguments[index] = value(arguments[index])
    with pytest.raises(ValueError, match=message):
        _ops.fit_narrow(*arguments)


@pytest.mark.skipif(not (torch.cuda.is_available() and _C.has_cuda), reason="needs a CUDA device and a CUDA build")
@pytest.mark.parametrize("widths", [[3, 4, 2], [64, 64, 31], [2, 64, 64]])
def test_cuda_agrees_with_cpu(widths):
    X, Y = data_of(0, 1000, widths[0], 3)
    options = {"n_tries": 3, "alpha": 0.5, "l2": 1e-3, "random_state": 0}
    here = fit_narrow(X, Y, widths[1:], **options)
    there = fit_narrow(torch.from_numpy(X).cuda(), Y, widths[1:], **options)
    np.testing.assert_allclose(there.representation.cpu().numpy(), here.representation, rtol=0, atol=1e-8)
    np.testing.assert_allclose(there.lsd.cpu().numpy(), here.lsd, rtol=1e-8)


def test_a_singular_layer_never_looks_perfect():
    """beta = 0 makes layers of nearly dependent units; pivots of rounding must not explain all of y."""
    x = np.linspace(-1, 1, 5000)
    for seed in range(5):
        net = fit_narrow(
            x[:, None], np.sin(2 * np.pi * x), [8] * 60, alpha=0.3, beta=0.0, scaling="absolute", random_state=seed
        )
        assert net.lsd.min() > 1e-3


def test_complex_numbers_and_other_widths_are_refused():
    X, Y = data_of(0, 30, 3, 1)
    with pytest.raises(ValueError, match="expected real numbers in X and Y"):
        fit_narrow(X * 1j, Y, [3])
    net = fit_narrow(X, Y, [3], random_state=0)
    with pytest.raises(ValueError, match=r"expected real X of shape \(m, 3\)"):
        net.predict(X[:, :2])
