"""rolling_ridge against statsmodels RollingOLS and polars-ols, all on one thread.

RollingOLS has no penalty, so coefficients are compared without one; polars-ols has a ridge penalty. polars fixes its
number of threads when it is first imported: run this file by itself.
"""

from __future__ import annotations

import os

for name in ("POLARS_MAX_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import machine, print_rows, time_interleaved  # noqa: E402

from platonic.batched import rolling_ridge  # noqa: E402

SHAPES = ((2_000, 5, 60), (2_000, 5, 252), (10_000, 100, 252), (10_000, 100, 1_000))
L2 = 0.1


def _statsmodels(x: np.ndarray, y: np.ndarray, window: int) -> Callable[[], np.ndarray] | None:
    try:
        from statsmodels.regression.rolling import RollingOLS
    except ImportError:
        return None
    return lambda: RollingOLS(y, x, window=window).fit(params_only=True).params


def _polars(x: np.ndarray, y: np.ndarray, window: int) -> Callable[[], Any] | None:
    try:
        import polars as pl
        import polars_ols  # noqa: F401
    except ImportError:
        return None
    columns = [f"x{i}" for i in range(x.shape[1])]
    frame = pl.DataFrame({"y": y, **{name: x[:, i] for i, name in enumerate(columns)}})
    fit = pl.col("y").least_squares.rolling_ols(
        *columns, window_size=window, min_periods=window, alpha=L2, mode="coefficients"
    )
    return lambda: frame.select(fit)


def run(quick: bool = False) -> list[dict]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure(*shape, quick) for shape in (SHAPES[:2] if quick else SHAPES)]
    finally:
        torch.set_num_threads(threads)


def _measure(n: int, p: int, window: int, quick: bool) -> dict:
    generator = np.random.default_rng(n + p)
    x = generator.standard_normal((n, p))
    y = x @ generator.standard_normal(p) + generator.standard_normal(n)

    def ours(l2: float = L2) -> np.ndarray:
        return rolling_ridge(x, y, window, l2, fit_intercept=False).coef

    polars, statsmodels = _polars(x, y, window), _statsmodels(x, y, window)
    candidates: dict[str, Callable[[], Any]] = {"ours": ours}
    if polars is not None:
        theirs = polars().to_series().struct.unnest().to_numpy()
        np.testing.assert_allclose(ours()[window:], theirs[window:], rtol=1e-6, atol=1e-9)
        candidates["polars-ols"] = polars
    if statsmodels is not None:
        np.testing.assert_allclose(ours(0.0)[window:], statsmodels()[window:], rtol=1e-6, atol=1e-9)
        candidates["statsmodels"] = statsmodels
    times = time_interleaved(candidates, rounds=3 if p > 50 else 7)
    low, middle, high = times["ours"]
    row = {"n": n, "p": p, "window": window, "ms": 1e3 * middle, "20%": 1e3 * low, "80%": 1e3 * high}
    row["not installed"] = ", ".join(name for name in ("polars-ols", "statsmodels") if name not in times) or "-"
    for name in ("polars-ols", "statsmodels"):
        if name in times:
            row |= {f"{name} ms": 1e3 * times[name][1], f"x {name}": times[name][1] / middle}
    return row


if __name__ == "__main__":
    print(machine())
    print_rows(run())
