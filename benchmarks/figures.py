"""Redraws figures of the thesis. One function a figure; ``python benchmarks/figures.py [name ...]`` draws them.

Pictures go to docs/figures/, the numbers behind them to standard output.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from platonic import PlatonicMLPClassifier
from platonic.datasets import make_checkerboard
from platonic.narrow import fit_narrow

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"


def _sine() -> tuple[np.ndarray, np.ndarray]:
    """Two periods on (-1, 1), 5,000 samples (section 7.5)."""
    x = np.linspace(-1, 1, 5000)
    return x[:, None], np.sin(2 * np.pi * x)


def _save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def figure_7_6(layers: int = 10_000, seeds: int = 3) -> list[dict]:
    """Lowest LSD over a very deep narrow network, by tries per layer and width; median and range over seeds.

    The thesis does not give alpha and beta here. Taken literally, alpha = beta = 1 overflows after some 360 layers of
    16 units, since each layer enlarges its input by about alpha sqrt(width): alpha = 1 / sqrt(width) stops that.
    The right panel has relative scaling, alpha = 0.5 and beta = 3 for every width.
    """
    x, y = _sine()
    widths, tries, rows = (2, 4, 8, 16), (1, 5, 10), []
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for panel, scaling in zip(panels, ("absolute", "relative"), strict=True):
        for width in widths:
            alpha, beta = (width**-0.5, 1.0) if scaling == "absolute" else (0.5, 3.0)
            lowest = np.empty((len(tries), seeds))
            for i, n_tries in enumerate(tries):
                for seed in range(seeds):
                    net = fit_narrow(
                        x,
                        y,
                        [width] * layers,
                        n_tries=n_tries,
                        alpha=alpha,
                        beta=beta,
                        scaling=scaling,
                        random_state=seed,
                    )
                    lowest[i, seed] = net.lsd.min()
                    rows.append(
                        {
                            "scaling": scaling,
                            "width": width,
                            "tries": n_tries,
                            "seed": seed,
                            "lowest LSD": f"{net.lsd.min():.2e}",
                            "at layer": int(net.lsd.argmin()),
                            "last LSD": f"{net.lsd[-1]:.2e}",
                            "jittered": net.n_jittered,
                        }
                    )
                    print(rows[-1], flush=True)
            (line,) = panel.plot(tries, np.median(lowest, 1), "o-", label=f"nhid = {width}")
            panel.fill_between(tries, lowest.min(1), lowest.max(1), color=line.get_color(), alpha=0.15)
        text = "alpha = 1/sqrt(nhid), beta = 1" if scaling == "absolute" else "alpha = 0.5, beta = 3"
        panel.set(yscale="log", xlabel="tries per layer", xticks=tries, title=f"{scaling} scaling, {text}")
        panel.grid(True, which="both", alpha=0.25)
    panels[0].set_ylabel("lowest LSD of any layer")
    panels[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(f"Figure 7.6: sine, {layers:,} layers (median and range over {seeds} seeds)", y=1.02)
    _save(figure, "figure_7_6")
    return rows


def figure_7_7(layers: int = 100, width: int = 8, seeds: int = 5) -> list[dict]:
    """LSD by layer for several alpha (beta = 1) and several beta (alpha = 0.3): geometric mean over seeds.

    The thesis names neither the values it draws, nor n_tries: 1 here. A line ends where a representation overflows.
    """
    x, y = _sine()
    panels = {"alpha": (0.1, 0.2, 0.3, 0.5, 1.0), "beta": (0.0, 0.3, 1.0, 3.0, 10.0, 100.0)}
    fixed, rows = {"alpha": {"beta": 1.0}, "beta": {"alpha": 0.3}}, []
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        for value in values:
            errors = []
            for seed in range(seeds):
                options = {name: value, **fixed[name]}
                try:
                    net = fit_narrow(x, y, [width] * layers, scaling="absolute", random_state=seed, **options)
                except ValueError:  # overflow
                    errors.append(np.full(layers, np.nan))
                else:
                    errors.append(net.lsd[1:])
            mean = np.exp(np.log(np.array(errors)).mean(0))
            axis.plot(np.arange(1, layers + 1), mean, label=f"{name} = {value:g}")
            rows.append({"varied": name, "value": value, "layer 10": mean[9], "layer 30": mean[29], "last": mean[-1],
                         "lowest": mean.min(), "at layer": int(mean.argmin()) + 1})  # fmt: skip
            print(rows[-1], flush=True)
        ((other, constant),) = fixed[name].items()
        axis.set(yscale="log", xlabel="layer", title=f"{name}, at {other} = {constant:g}")
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("LSD")
    figure.suptitle(f"Figure 7.7: sine, {layers} layers of {width} CELU units, mean over {seeds} seeds", y=1.0)
    _save(figure, "figure_7_7")
    return rows


def figure_7_11(seeds: int = 3) -> list[dict]:
    """Checkerboard: MSE and accuracy of three hidden layers by their width, n_tries = 5, alpha = .08, beta = 200."""
    data = make_checkerboard()
    X, y = data.X_train, data.y_train
    widths, rows = [2**i for i in range(1, 12)], []
    errors, scores = np.empty((2, len(widths), seeds))
    for i, width in enumerate(widths):
        for seed in range(seeds):
            model = PlatonicMLPClassifier(
                (width,) * 3, projection="random", scaling="absolute", alpha=0.08, beta=200.0, n_tries=5, l2=0.0,
                random_state=seed,
            ).fit(X, y)  # fmt: skip
            errors[i, seed], scores[i, seed] = model.layer_scores_[-1].lsd, 100 * model.layer_scores_[-1].score
        rows.append({"width": width, "MSE": np.median(errors[i]), "accuracy": np.median(scores[i])})
        print(rows[-1], flush=True)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, values, label in zip(axes, (errors, scores), ("MSE", "accuracy, %"), strict=True):
        axis.plot(widths, np.median(values, 1), "o-", label="ours")
        axis.fill_between(widths, values.min(1), values.max(1), alpha=0.2)
        axis.set(xlabel="units per hidden layer", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(True, which="both", alpha=0.25)
    axes[1].plot([1024, 2048], [95.62, 99.84], "x", color="black", label="thesis")
    axes[1].legend()
    figure.suptitle(f"Figure 7.11: checkerboard, three hidden layers (median and range over {seeds} seeds)", y=1.0)
    _save(figure, "figure_7_11")
    return rows


FIGURES = {"figure_7_6": figure_7_6, "figure_7_7": figure_7_7, "figure_7_11": figure_7_11}


if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        if name not in FIGURES:
            raise SystemExit(f"expected one of {', '.join(FIGURES)}, got {name!r}")
        FIGURES[name]()
