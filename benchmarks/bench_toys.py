"""The thesis's toy problems: sine, two spirals, checkerboard, and spirals with wrong labels.

``python benchmarks/bench_toys.py [--part sine|spirals|checkerboard|noise] [--quick]``. All scores are those of the
training set, as in the thesis. "literal" is the code of its figure 7.3 with ``torch.linalg.pinv`` in float64, run on
the very P that the estimator draws.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import print_rows

from platonic import PlatonicMLPClassifier, PlatonicMLPRegressor
from platonic.datasets import make_checkerboard, make_sine, make_two_spirals

SPIRALS = (32, 32, 32, 32)
TURNS = (1.0, 1.5, 2.0)
SETTINGS = ((0.1, 10.0), (1.0, 2.0))  # alpha, beta of table 7.1
BOARDS = {"4 x 2500": (2500,) * 4, "500 x 300": (300,) * 500}
BOARD_SETTINGS = ((0.06, 25.0), (0.08, 200.0))  # of figure 7.10
SINE_BAR, SPIRAL_BAR, LITERAL_MARGIN, BOARD_MSE_BAR = 2e-5, 99.5, 0.2, 1e-20


def literal(
    X: np.ndarray, y: np.ndarray, widths: Sequence[int], activation: Callable, alpha: float, beta: float, seed: int
) -> np.ndarray:
    """Fitted values (m,) of figure 7.3 with T = alpha [Z | beta Y] P (section 7.5.2), on the estimator's draws.

    The estimator seeds ``default_rng`` with four integers below 2^31 - 1 that its `random_state` draws, and takes P of
    a layer from it as one (1 + n + k, width) block.
    """
    rng = np.random.default_rng(np.random.RandomState(seed).randint(0, 2**31 - 1, 4))
    Z, Y = torch.from_numpy(X).double(), torch.from_numpy(y).double()[:, None]
    ones = torch.ones(len(Z), 1, dtype=torch.float64)
    Z = torch.cat([ones, Z], 1)
    for width in widths:
        P = torch.from_numpy(rng.standard_normal((Z.shape[1] + 1, width)))
        T = alpha * torch.cat([Z, beta * Y], 1) @ P
        Z = torch.cat([ones, activation(Z @ (torch.linalg.pinv(Z) @ T))], 1)
    return (Z @ (torch.linalg.pinv(Z) @ Y))[:, 0].numpy()


def _row(problem: str, setting: str, seeds: int, measure: str, values: Sequence[float], bar: str, met: bool) -> dict:
    v = np.asarray(values, dtype=float)
    return {
        "problem": problem, "setting": setting, "seeds": seeds, "measure": measure, "mean": float(v.mean()),
        "sd": float(v.std(ddof=1)) if len(v) > 1 else 0.0, "median": float(np.median(v)), "worst": float(
            v.max() if "MSE" in measure else v.min()
        ), "bar": bar, "met": "yes" if met else "no",
    }  # fmt: skip


def sine(quick: bool = False) -> list[dict]:
    """1-16-16-1 CELU: median training MSE over seeds."""
    data, seeds, rows = make_sine(), 5 if quick else 20, []
    X, y = data.X_train, data.y_train
    celu = torch.nn.functional.celu
    fits: dict[str, Callable[[int], np.ndarray]] = {
        "defaults": lambda seed: (
            PlatonicMLPRegressor((16, 16), activation="celu", random_state=seed).fit(X, y).predict(X)
        ),
        "absolute, alpha=1, beta=1, l2=0": lambda seed: (
            PlatonicMLPRegressor(
                (16, 16), activation="celu", scaling="absolute", l2=0.0, alpha=1.0, beta=1.0, random_state=seed
            )
            .fit(X, y)
            .predict(X)
        ),
        "literal figure 7.3": lambda seed: literal(X, y, (16, 16), celu, 1.0, 1.0, seed),
    }
    for name, fit in fits.items():
        errors = [float(np.mean((fit(seed) - y) ** 2)) for seed in range(seeds)]
        met = float(np.median(errors)) <= SINE_BAR
        rows.append(_row("sine", name, seeds, "MSE", errors, f"median <= {SINE_BAR}", met))
        print_rows(rows[-1:])
    return rows


def spirals(quick: bool = False) -> list[dict]:
    """2-32-32-32-32-1 tanh: mean accuracy over seeds."""
    seeds, rows = 5 if quick else 100, []
    for sampling in ("arc", "radius"):
        for turns in TURNS:
            data = make_two_spirals(turns=turns, sampling=sampling)
            X, y = data.X_train, data.y_train
            where = f"{sampling}, {turns} turns"
            for alpha, beta in SETTINGS:
                rows += _against_literal(X, y, alpha, beta, where, seeds)
            scores = [_accuracy(X, y, seed) for seed in range(seeds)]
            met = float(np.mean(scores)) >= SPIRAL_BAR
            rows.append(_row("spirals", f"{where}, defaults", seeds, "accuracy", scores, f">= {SPIRAL_BAR}", met))
            print_rows(rows[-1:])
    return rows


def _accuracy(X: np.ndarray, y: np.ndarray, seed: int, **options: Any) -> float:
    return 100 * PlatonicMLPClassifier(SPIRALS, activation="tanh", random_state=seed, **options).fit(X, y).score(X, y)


def _against_literal(X: np.ndarray, y: np.ndarray, alpha: float, beta: float, where: str, seeds: int) -> list[dict]:
    options = {"scaling": "absolute", "projection": "random", "l2": 0.0, "alpha": alpha, "beta": beta}
    single = X.astype(np.float32)
    ours, theirs = [], []
    for seed in range(seeds):
        ours.append(_accuracy(single, y, seed, **options))
        fitted = literal(X, 2.0 * y - 1, SPIRALS, torch.tanh, alpha, beta, seed)
        theirs.append(100 * float(np.mean((fitted > 0) == (y == 1))))
    setting, least = f"{where}, alpha={alpha}, beta={beta}", float(np.mean(theirs)) - LITERAL_MARGIN
    rows = [
        _row("spirals", f"{setting}, float32 input", seeds, "accuracy", ours, f">= {least:.2f}",
             float(np.mean(ours)) >= least),
        _row("spirals", f"{setting}, literal float64", seeds, "accuracy", theirs, "", True) | {"met": ""},
    ]  # fmt: skip
    print_rows(rows)
    return rows


def checkerboard(quick: bool = False) -> list[dict]:
    """4 x 2500 and 500 x 300 ReLU: accuracy and mean squared error of the output."""
    data, rows = make_checkerboard(), []
    boards = {"4 x 500": (500,) * 4} if quick else BOARDS
    for alpha, beta in BOARD_SETTINGS[: 1 if quick else None]:
        for name, widths in boards.items():
            for dtype in ("float64", "float32"):
                X = data.X_train.astype(dtype)
                start = time.perf_counter()
                model = PlatonicMLPClassifier(
                    widths, scaling="absolute", projection="random", l2=0.0, alpha=alpha, beta=beta, random_state=0
                ).fit(X, data.y_train)
                seconds = time.perf_counter() - start
                signs = 2.0 * data.y_train - 1
                accuracy = 100 * model.score(X, data.y_train)
                mse = float(np.mean((np.asarray(model.decision_function(X), dtype=float) - signs) ** 2))
                lowest = min(record.lsd for record in model.layer_scores_)
                setting = f"{name}, alpha={alpha}, beta={beta}, {dtype} input"
                rows.append(_row("checkerboard", setting, 1, "accuracy", [accuracy], ">= 100", accuracy == 100))
                deep = name == "500 x 300" and dtype == "float64"
                rows.append(
                    _row("checkerboard", setting, 1, "MSE", [mse], f"<= {BOARD_MSE_BAR}" if deep else "",
                         mse <= BOARD_MSE_BAR)
                )  # fmt: skip
                rows[-1] |= {"lowest LSD": lowest, "seconds": round(seconds, 1)} | ({} if deep else {"met": ""})
                print_rows(rows[-2:])
    return rows


def noise(quick: bool = False) -> list[dict]:
    """Spirals of one turn, a tenth or three tenths of the labels flipped: accuracy against the true labels."""
    seeds, rows = 2 if quick else 10, []
    data = make_two_spirals(turns=1.0)
    X, y = data.X_train, data.y_train
    for share in (0.0, 0.1, 0.3):
        scores = []
        for seed in range(seeds):
            wrong = np.random.default_rng(seed).random(len(y)) < share
            model = PlatonicMLPClassifier(SPIRALS, activation="tanh", random_state=seed).fit(
                X, np.where(wrong, 1 - y, y)
            )
            scores.append(100 * model.score(X, y))
        rows.append(_row("label noise", f"{share:.0%} flipped, defaults", seeds, "accuracy", scores, "", True))
        rows[-1]["met"] = ""
        print_rows(rows[-1:])
    return rows


PARTS = {"sine": sine, "spirals": spirals, "checkerboard": checkerboard, "noise": noise}


def run(quick: bool = False, part: str | None = None) -> list[dict]:
    """Rows of all parts, or of one; `quick`: 5 seeds, and a checkerboard of 4 x 500."""
    return [row for name, measure in PARTS.items() if part in (None, name) for row in measure(quick)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=tuple(PARTS))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print_rows(run(arguments.quick, arguments.part))
