"""fit_narrow: 5,000 layers x 12 units x 5,000 samples of the sine on one core, against NumPy and the arithmetic floor.

The peer is what a NumPy user writes for the same layers (Gram matrix, solve, W from equation 7.2, activation), timed
over fewer layers in the same run and scaled. The floor counts multiply-adds alone: m (h^2 + h (h + 1) / 2 + 2 h) a
layer, over the rate of a matrix product in cache on the same core; activations and the small solves are not in it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.benchmark import Timer

from platonic import _ops, narrow, reference
from platonic_core import _C

ROWS, WIDTH = 5000, 12


def _sine() -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(-1, 1, ROWS)
    return x[:, None], np.sin(2 * np.pi * x)[:, None]


def _numpy_layers(x: np.ndarray, y: np.ndarray, draws: list[np.ndarray], alpha: float, activation: str) -> np.ndarray:
    act, z = reference._ACTIVATIONS[activation], x
    for draw in draws:
        z_mean, y_mean = z.mean(0), y.mean(0)
        centred = z - z_mean
        B = np.linalg.lstsq(centred.T @ centred, centred.T @ (y - y_mean), rcond=1e-14)[0]
        p_1, P_Z, P_Y = draw[0, 0], draw[0, 1:-1], draw[0, -1:]
        z = act(z @ (alpha * (P_Z + B @ P_Y)) + alpha * (p_1 + (y_mean - z_mean @ B) @ P_Y))
    return z


def _gemm_rate() -> float:
    """Multiply-adds per second of a float64 product whose operands stay in the second-level cache, one thread."""
    a, b = torch.randn(192, 192, dtype=torch.float64), torch.randn(192, 192, dtype=torch.float64)
    time = Timer("torch.mm(a, b, out=c)", globals={"torch": torch, "a": a, "b": b, "c": torch.empty_like(a)})
    return 192**3 / time.blocked_autorange(min_run_time=0.3).median


def _row(layers: int, activation: str, n_tries: int, quick: bool) -> dict:
    alpha = 0.3
    x, y = _sine()
    rng = np.random.Generator(np.random.PCG64(0))
    widths = [1] + [WIDTH] * layers
    draws = [rng.standard_normal((n_tries, 2 + h, WIDTH)) for h in widths[:-1]]
    few = draws[:5]
    wanted = reference.fit_narrow(x, y, few, activation=activation, alpha=alpha, l2=1e-3, relative=False)
    z, shift = narrow._pack(torch.from_numpy(x), WIDTH, None)
    targets, y_stats = narrow._pack_targets(torch.from_numpy(y), None)

    def fit(draws: list[np.ndarray], widths: list[int], l2: float = 0.0) -> tuple[torch.Tensor, ...]:
        normals = torch.from_numpy(np.concatenate([d.ravel() for d in draws]))
        options = (activation, alpha, 1.0, 1.0, l2, 1e-14, False, False)
        return _ops.fit_narrow(z, shift, targets, y_stats, normals, ROWS, widths, n_tries, *options)

    # verified with a ridge: without one, 12 celu units of one input are collinear to rounding
    np.testing.assert_allclose(fit(few, widths[:6], 1e-3)[4], wanted["lsd"], rtol=1e-6)
    ours = Timer("fit(draws, widths)", globals={"fit": fit, "draws": draws, "widths": widths})
    peer_layers = 10 if quick else 100
    peer = Timer(
        "peer(x, y, draws, alpha, activation)",
        globals={"peer": _numpy_layers, "x": x, "y": y, "draws": draws[:peer_layers], "alpha": alpha,
                 "activation": activation},
    )  # fmt: skip
    times, peer_times = [], []
    for _ in range(2 if quick else 9):
        times.append(ours.timeit(1).median)
        peer_times.append(peer.timeit(1).median * layers / peer_layers * n_tries)
    low, middle, high = np.percentile(times, [20, 50, 80])
    floor = layers * n_tries * ROWS * (WIDTH**2 + WIDTH * (WIDTH + 1) / 2 + 2 * WIDTH) / _gemm_rate()
    return {
        "what": f"{layers} layers x {WIDTH} {activation}, {ROWS} rows, {n_tries} tries, {_C.isa()}, 1 thread",
        "seconds": middle,
        "p20": low,
        "p80": high,
        "numpy seconds": float(np.median(peer_times)),
        "ratio": float(np.median(peer_times)) / middle,
        "floor seconds": floor,
        "times floor": middle / floor,
    }


def run(quick: bool = False) -> list[dict]:
    """Rows of the benchmark; `quick` times 200 layers rather than 5,000."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layers = 200 if quick else 5000
        cases = [("celu", 1), ("relu", 1)] if quick else [("celu", 1), ("relu", 1), ("tanh", 1), ("celu", 5)]
        return [_row(layers if tries == 1 else layers // 5, activation, tries, quick) for activation, tries in cases]
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    for row in run():
        print({name: f"{value:.3g}" if isinstance(value, float) else value for name, value in row.items()})
