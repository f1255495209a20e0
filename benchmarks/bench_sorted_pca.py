"""sorted_pca against scikit-learn's PCA(1) + argsort on MNIST's 60,000 x 784, same run, same number of threads.

`python benchmarks/bench_sorted_pca.py --data-dir FOLDER [--quick]`; FOLDER holds train-images-idx3-ubyte[.gz].
Without it, 60,000 rows of random pixels of rank 40 plus noise.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from torch.utils.benchmark import Timer

from platonic import pca

SAMPLES = 1000


def load(folder: Path | None, rows: int) -> np.ndarray:
    """[rows, 784] in 0 .. 1, float64."""
    if folder is None:
        rng = np.random.default_rng(0)
        factors = rng.normal(size=(rows, 40)) * 0.85 ** np.arange(40)
        return factors @ rng.normal(size=(40, 784)) + 0.1 * rng.normal(size=(rows, 784))
    file = next(folder.glob("train-images*"))
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 784)[:rows] / 255.0


def by_scikit_learn(X: np.ndarray) -> np.ndarray:
    order = np.argsort(PCA(1).fit_transform(X)[:, 0], kind="stable")
    return order[(2 * np.arange(SAMPLES) + 1) * len(X) // (2 * SAMPLES)]


def verify(X: np.ndarray, exact: np.ndarray) -> tuple[int, float]:
    """How many indices differ from float64 scikit-learn's, and by how much of the projections' range."""
    ranks = (2 * np.arange(SAMPLES) + 1) * len(X) // (2 * SAMPLES)
    expected, picked = np.argsort(exact, kind="stable")[ranks], pca.sorted_pca(X, SAMPLES)
    apart = np.abs(exact[picked] - exact[expected]).max() / np.ptp(exact)
    assert apart < 1e-5, apart
    return int((picked != expected).sum()), float(apart)


def run(quick: bool = False, data_dir: Path | None = None) -> list[dict]:
    X = load(data_dir, 10_000 if quick else 60_000)
    fitted = PCA(1).fit(X)
    axis = fitted.components_[0]
    exact = (X - X.mean(0)) @ (axis * np.sign(axis[np.abs(axis).argmax()]))
    rows, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with threadpool_limits(threads):
            for dtype in (np.float32, np.float64):
                x = X.astype(dtype)
                differ, apart = verify(x, exact)
                passes = pca.first_component(x).passes
                timers = {
                    name: Timer("f()", globals={"f": f}, num_threads=threads)
                    for name, f in (
                        ("ours", lambda x=x: pca.sorted_pca(x, SAMPLES)),
                        ("scikit_learn", lambda x=x: by_scikit_learn(x)),
                        ("read", lambda x=x: torch.from_numpy(x).sum()),
                    )
                }
                times = {name: [] for name in timers}
                for _ in range(3 if quick else 5):
                    for name, timer in timers.items():
                        times[name].append(timer.timeit(1).median)
                ours, peer, read = (np.percentile(t, [20, 50, 80]) for t in times.values())
                rows.append({
                    "rows": len(x), "dtype": np.dtype(dtype).name, "threads": threads, "passes": passes,
                    "ours_s": ours[1], "ours_p20_s": ours[0], "ours_p80_s": ours[2], "scikit_learn_s": peer[1],
                    "ratio": peer[1] / ours[1], "floor_s": passes * read[1], "differ": differ, "apart": apart,
                })  # fmt: skip
    torch.set_num_threads(before)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    for row in run(options.quick, options.data_dir):
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
