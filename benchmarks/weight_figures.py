"""Figures 3.1 to 3.5 of the thesis: how far the weights of a training network can be compressed.

``python benchmarks/weight_figures.py --data-dir FOLDER [--epochs 100] [--seeds 3] [--recipe NAME]``; FOLDER holds MNIST's
four IDX files. An epoch takes about 4 s on one core, so that three seeds of 100 epochs take 20 minutes.

784-392-50-10, tanh throughout, mean squared error against +-1 targets, minibatch gradient descent with momentum, as the
thesis's section 3.1 as far as it says; ``trained_networks.RECIPES`` has what it does not say. After every epoch the weights
are compressed with several M and c (F = 3 %), layer by layer, and the network that decompression gives is scored on the
test set beside the exact one. Training goes on from the exact weights. Nothing is chosen by these scores. Biases, 452
numbers, are compressed too and counted in.

Prints the averages over all epochs beside the thesis's figures, mean and worst over the seeds, and draws figure_3.png and
figure_3_4.png in docs/figures (or ``--out``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Skipped, print_rows
from trained_networks import RECIPES, Images, Recipe, accuracy, load_images, make_perceptron, prepare, train_perceptron

import weight_compression as wc
from platonic_core.figures import new_figure, save_figure

CEILING = [(10 - c, c) for c in range(2, 11)]  # (M, c) of figure 3.4a; M = 0: 10 bits for every tensor
RANGE = [(4, c) for c in range(2, 9)]  # of figure 3.4b
PAIRS = list(dict.fromkeys(CEILING + RANGE))
SHOWN = ((4, 5), (4, 6))  # of figure 3.5 and the table
THESIS = {(4, 5): (3.55, 9.01), (4, 6): (3.78, 8.47)}  # bits a weight and ratio against float32
FIXED_BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"


def configuration(pair: tuple[int, int]) -> wc.CompressionConfig:
    bits, floor = pair
    return wc.CompressionConfig(bits=floor) if bits == 0 else wc.CompressionConfig(entropy_bits=bits, floor_bits=floor)


@torch.no_grad()
def compressed(state: dict, config: wc.CompressionConfig) -> tuple[dict, dict]:
    """The state that decompression gives, and the payloads."""
    payloads = {name: wc.compress(tensor, config) for name, tensor in state.items()}
    return {name: wc.decompress(payload) for name, payload in payloads.items()}, payloads


def bits_per_weight(payloads: dict, huffman: bool = True) -> float:
    """Of all payloads together; without the Huffman code, log2 of each tensor's levels."""
    infos = [(wc.payload_info(p), p.numel()) for p in payloads.values()]
    numel = sum(int(np.prod(info.shape)) for info, _ in infos)
    if huffman:
        return 8 * sum(size for _, size in infos) / numel
    return sum(np.prod(i.shape) * (np.log2(i.levels) if i.levels else 8 * i.dtype.itemsize) for i, _ in infos) / numel


def train(images: Images, recipe: Recipe, epochs: int, seed: int) -> list[dict]:
    """A row per epoch, the first before any training.

    row[M, c]: bits a weight, the same without the Huffman code, test accuracy.
    """
    images = prepare(images, recipe)
    scored = make_perceptron(images.x.shape[1], recipe, torch.Generator())
    rows = []
    for epoch, (network, gradient_rms) in enumerate(train_perceptron(images, recipe, epochs, seed)):
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        row: dict = {"epoch": epoch, "exact": accuracy(network, images.x_test, images.y_test)}
        row["gradient rms"] = gradient_rms
        for pair in PAIRS:
            restored, payloads = compressed(state, configuration(pair))
            scored.load_state_dict(restored)
            score = accuracy(scored, images.x_test, images.y_test)
            row[pair] = (bits_per_weight(payloads), bits_per_weight(payloads, False), score)
        row["entropy"] = {
            (m, f): [wc.estimate_entropy(state[f"{2 * k}.weight"], bits=m, sample_fraction=f) for k in range(3)]
            for m in (4, 6, 8)
            for f in (0.03, 1.0)
        }
        if epoch == epochs:
            row["fixed"] = []
            for bits in FIXED_BITS:
                scored.load_state_dict(compressed(state, wc.CompressionConfig(bits=bits))[0])
                row["fixed"].append(accuracy(scored, images.x_test, images.y_test))
        rows.append(row)
    return rows


def summarise(runs: list[list[dict]]) -> list[dict]:
    """For each (M, c): averages over epochs and seeds, the worst of both."""
    table = []
    for pair in PAIRS:
        rows = [row for run in runs for row in run[1:]]
        bits = np.array([row[pair][0] for row in rows])
        lost = np.array([[row["exact"] - row[pair][2] for row in run[1:]] for run in runs])  # [seeds, epochs]
        thesis = THESIS.get(pair, ("", ""))
        table.append(
            {
                "M": pair[0],
                "c": pair[1],
                "bits/weight": bits.mean(),
                "thesis bits": thesis[0],
                "ratio": 32 / bits.mean(),
                "thesis ratio": thesis[1],
                "log2 levels": np.mean([row[pair][1] for row in rows]),
                "exact %, last epoch": f"{np.mean([run[-1]['exact'] for run in runs]):.2f}",
                "compressed %": f"{np.mean([run[-1][pair][2] for run in runs]):.2f}",
                "worst seed's": f"{min(run[-1][pair][2] for run in runs):.2f}",
                "points lost, mean": lost.mean(),
                "worst seed's mean": lost.mean(1).max(),
                "worst epoch": lost.max(),
                "peak epoch": np.mean([_peak(run, pair) for run in runs]),
                "exact's": np.mean([_peak(run, None) for run in runs]),
            }
        )
    return table


def _peak(run: list[dict], pair: tuple[int, int] | None) -> int:
    """The epoch of the highest test accuracy, the thesis's "convergence"."""
    return 1 + int(np.argmax([row["exact"] if pair is None else row[pair][2] for row in run[1:]]))


def draw_all_but_3_4(runs: list[list[dict]], path: Path) -> None:
    run = runs[0]
    epochs = [row["epoch"] for row in run[1:]]
    figure = new_figure(11, 7)
    axes = figure.subplots(2, 2)
    ax = axes[0, 0]
    for one in runs:
        ax.plot(FIXED_BITS, one[-1]["fixed"], "o-", color="tab:blue")
        ax.axhline(one[-1]["exact"], color="tab:grey", ls="--")
    ax.set(title="3.1: fixed bits, last epoch (dashed: exact)", xlabel="bits per weight", ylabel="test accuracy, %")
    ax.set_ylim(max(80, min(min(o[-1]["fixed"]) for o in runs)), 100)
    ax = axes[0, 1]
    for layer in range(3):
        ax.semilogy(epochs, [row["gradient rms"][layer] for row in run[1:]], label=f"layer {layer + 1}")
    ax.set(title="3.2: gradients over the epoch", xlabel="epoch", ylabel="RMS of dMSE/dW")
    ax.legend()
    ax = axes[1, 0]
    for (m, fraction), style in ((key, "-" if key[1] == 1.0 else ":") for key in run[1]["entropy"]):
        for layer, colour in enumerate(("tab:blue", "tab:orange", "tab:green")):
            label = f"M = {m}, {'all' if fraction == 1.0 else '3 %'}" if layer == 0 else None
            ax.plot(epochs, [row["entropy"][m, fraction][layer] for row in run[1:]], style, color=colour, label=label)
    ax.set(title="3.3: entropy (blue, orange, green: layers 1, 2, 3)", xlabel="epoch", ylabel="bits")
    ax.legend(fontsize=7, ncols=3)
    ax = axes[1, 1]
    for pair, colour in zip(SHOWN, ("tab:blue", "tab:red"), strict=True):
        coded, raw = ([row[pair][i] for row in run[1:]] for i in (0, 1))
        ax.plot(epochs, coded, color=colour, label=f"c = {pair[1]}, Huffman coded")
        ax.plot(epochs, raw, "--", color=colour, label=f"c = {pair[1]}, log2 of levels")
        ax.axhline(THESIS[pair][0], color=colour, ls=":", lw=0.8, label=f"c = {pair[1]}, thesis's mean, coded")
    ax.set(title="3.5: bits per weight", xlabel="epoch", ylabel="bits", ylim=(0, None))
    ax.legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def draw_3_4(runs: list[list[dict]], path: Path) -> None:
    """Left: c + M = 10. Right: M = 4. Lines are means over seeds, dots single seeds; the exact network comes first."""
    figure = new_figure(11, 8.5)
    axes = figure.subplots(3, 2, sharex="col", sharey="row")
    for column, (pairs, title) in enumerate(
        ((CEILING, "3.4a, c: ceiling of 10 bits, M = 10 - c"), (RANGE, "3.4b, d: M = 4"))
    ):
        names = ["exact"] + [f"{m + c}:{c}" for m, c in pairs]
        lost = [[run[-1][p][2] - run[-1]["exact"] for p in pairs] for run in runs]
        _plot_seeds(axes[0, column], names, [[0.0, *points] for points in lost])
        coded, raw = ([[np.mean([row[p][i] for row in run[1:]]) for p in pairs] for run in runs] for i in (0, 1))
        _plot_seeds(axes[1, column], names, [[np.nan, *bits] for bits in coded], label="Huffman coded")
        _plot_seeds(axes[1, column], names, [[np.nan, *bits] for bits in raw], "tab:grey", "log2 of levels")
        _plot_seeds(axes[2, column], names, [[_peak(run, p) for p in (None, *pairs)] for run in runs])
        axes[0, column].set_title(title)
        axes[0, column].axhline(0, color="tab:grey", lw=0.8, ls="--")
        for pair, (bits, _) in THESIS.items():
            if pair in pairs:
                label = "thesis, Huffman coded" if pair == SHOWN[-1] else None
                axes[1, column].plot(f"{sum(pair)}:{pair[1]}", bits, "x", color="tab:red", label=label)
        axes[1, column].legend(fontsize=8, loc="lower right")
        axes[2, column].set_xlabel("c + M : c")
    # One point for c = 2 must not flatten the rest.
    floor = min(run[-1][p][2] - run[-1]["exact"] for run in runs for p in PAIRS if p[1] >= 3)
    axes[0, 0].set_ylim(min(1.15 * floor, -0.1), 0.1)
    exact = np.mean([run[-1]["exact"] for run in runs])
    axes[0, 0].set_ylabel(f"points of test accuracy\nagainst the exact {exact:.2f} %")
    axes[1, 0].set_ylabel("bits per weight,\nmean over epochs")
    axes[1, 0].set_ylim(0, None)
    axes[2, 0].set_ylabel("epoch of the highest\ntest accuracy")
    save_figure(figure, path)


def _plot_seeds(ax, names: list[str], values: list[list[float]], colour: str = "tab:blue", label: str = "") -> None:
    """values [seeds, names]"""
    for one in values:
        ax.plot(names, one, ".", color=colour, alpha=0.5)
    ax.plot(names, np.mean(values, 0), "-", color=colour, label=label or None)
    ax.grid(alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--recipe", choices=RECIPES, default="standardised")
    parser.add_argument("--out", type=Path, default=FIGURES)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    try:
        _, images = load_images(options.data_dir)
    except Skipped as reason:
        raise SystemExit(str(reason)) from None
    runs = [train(images, RECIPES[options.recipe], options.epochs, seed) for seed in range(options.seeds)]
    print_rows(summarise(runs))
    fixed = np.array([run[-1]["fixed"] for run in runs])
    for name, scores in (("mean", fixed.mean(0)), ("worst seed", fixed.min(0))):
        text = ", ".join(f"{b}: {a:.2f}" for b, a in zip(FIXED_BITS, scores, strict=True))
        print(f"fixed bits, last epoch, {name}: {text}")
    draw_all_but_3_4(runs, options.out / "figure_3.png")
    draw_3_4(runs, options.out / "figure_3_4.png")


if __name__ == "__main__":
    main()
