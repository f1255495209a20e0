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


FIGURES = {"figure_7_6": figure_7_6}


if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        if name not in FIGURES:
            raise SystemExit(f"expected one of {', '.join(FIGURES)}, got {name!r}")
        FIGURES[name]()
