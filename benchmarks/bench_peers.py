"""PlatonicMLP with its defaults against scikit-learn's MLPClassifier and MLPRegressor with theirs.

``python benchmarks/bench_peers.py [--data-dir FOLDER] [--quick]``. Embedded sets: 5-fold cross-validation (shuffled,
stratified for classes) with 3 seeds; the peer in a pipeline with StandardScaler and max_iter=200, ours without one,
since it standardises by itself. The folds of a seed are the same for both, and a fold is fitted by one right after the
other. MNIST (with FOLDER): one fit on the 60,000 training images, the peer with max_iter=10.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Skipped, print_rows
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from platonic import PlatonicMLPClassifier, PlatonicMLPRegressor
from platonic.datasets import load

SETS = ("digits", "iris", "wine", "breast_cancer", "diabetes")
SHAPES = ((100,), (100, 100))
MNIST_SHAPE, MNIST_EPOCHS = (392, 50), 10
MAX_ITER = 200


def _models(task: str, shape: tuple[int, ...], seed: int, max_iter: int) -> tuple[Any, Any]:
    ours, theirs = (
        (PlatonicMLPClassifier, MLPClassifier) if task == "classification" else (PlatonicMLPRegressor, MLPRegressor)
    )
    peer = make_pipeline(StandardScaler(), theirs(hidden_layer_sizes=shape, max_iter=max_iter, random_state=seed))
    return ours(shape, random_state=seed), peer


def _fit(model: Any, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray) -> tuple[float, float]:
    """Test score in per cent and seconds of the fit."""
    start = time.perf_counter()
    model.fit(X, y)
    seconds = time.perf_counter() - start
    return 100 * model.score(X_test, y_test), seconds


def _row(name: str, task: str, shape: tuple[int, ...], scores: np.ndarray) -> dict:
    """scores (fits, 2 models, score and seconds)."""
    score, seconds = scores[..., 0].mean(0), np.median(scores[..., 1], 0)
    return {
        "data": name, "hidden": "-".join(map(str, shape)), "score": "accuracy" if task == "classification" else "R2",
        "fits": len(scores), "ours": score[0], "scikit-learn": score[1], "difference": score[0] - score[1],
        "seconds": seconds[0], "their seconds": seconds[1], "times faster": seconds[1] / seconds[0],
    }  # fmt: skip


def embedded(name: str, shape: tuple[int, ...], seeds: int) -> dict:
    data = load(name)
    X, y = data.X_train, data.y_train
    if data.X_test is not None:
        X, y = np.concatenate([X, data.X_test]), np.concatenate([y, data.y_test])
    splitter = StratifiedKFold if data.task == "classification" else KFold
    scores = []
    for seed in range(seeds):
        for train, test in splitter(5, shuffle=True, random_state=seed).split(X, y):
            models = _models(data.task, shape, seed, MAX_ITER)
            scores.append([_fit(model, X[train], y[train], X[test], y[test]) for model in models])
    return _row(name, data.task, shape, np.array(scores))


def mnist(data_dir: Path) -> dict:
    data = load("mnist", data_dir=data_dir)
    models = _models("classification", MNIST_SHAPE, 0, MNIST_EPOCHS)
    scores = [[_fit(model, data.X_train, data.y_train, data.X_test, data.y_test) for model in models]]
    return _row(f"mnist (theirs: {MNIST_EPOCHS} epochs)", "classification", MNIST_SHAPE, np.array(scores))


def run(quick: bool = False, data_dir: Path | None = None) -> list[dict]:
    """Rows of the embedded sets and, with `data_dir`, of MNIST; `quick`: one seed, one shape, no MNIST."""
    rows = []
    with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads()):
        warnings.simplefilter("ignore", ConvergenceWarning)  # max_iter is the default; the peer often wants more
        for name in SETS:
            for shape in SHAPES[: 1 if quick else None]:
                rows.append(embedded(name, shape, 1 if quick else 3))
                print_rows(rows[-1:])
        if data_dir is None:
            print("skipped: mnist: needs --data-dir with its four IDX files")
        elif not quick:
            try:
                rows.append(mnist(data_dir))
            except FileNotFoundError as error:
                raise Skipped(str(error)) from None
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print_rows(run(arguments.quick, arguments.data_dir))
