"""Figures 3.1, 3.2, 3.3 and 3.5 of the thesis: how far the weights of a training network can be compressed.

``python benchmarks/weight_figures.py --data-dir FOLDER [--epochs 100] [--seeds 1]``; FOLDER holds MNIST's four IDX files.

784-392-50-10, tanh throughout, mean squared error against +-1 targets, minibatch gradient descent with momentum, as the
thesis's section 3.1 as far as it says. After every epoch the weights are compressed with c = 5 and c = 6 (M = 4, F = 3 %),
layer by layer, and the network that decompression gives is scored on the test set beside the exact one. Nothing is chosen by
these scores. Biases, 452 numbers, are compressed too and counted in.

Prints the averages over all epochs beside the thesis's figures and draws docs/figures/figure_3.png.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from bench_mnist import load_mnist
from common import print_rows

import weight_compression as wc
from platonic_core.figures import new_figure, save_figure

WIDTHS = (784, 392, 50, 10)
FLOORS = (5.0, 6.0)
THESIS = {5.0: (3.55, 9.01), 6.0: (3.78, 8.47)}  # bits a weight and ratio against float32
FIXED_BITS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "figure_3.png"


def make_network(generator: torch.Generator) -> torch.nn.Sequential:
    """Tanh layers with weights of variance 1 / inputs (LeCun et al., 1998)."""
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layer = torch.nn.Linear(inputs, outputs)
        torch.nn.init.normal_(layer.weight, std=inputs**-0.5, generator=generator)
        torch.nn.init.zeros_(layer.bias)
        layers += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers)


@torch.no_grad()
def accuracy(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return 100 * float((network(x).argmax(1) == y).double().mean())


@torch.no_grad()
def compressed(network: torch.nn.Module, state: dict, config: wc.CompressionConfig) -> tuple[dict, dict]:
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


def train(data, epochs: int, seed: int) -> list[dict]:
    """A row per epoch, the first before any training."""
    generator = torch.Generator().manual_seed(seed)
    network, scored = make_network(generator), make_network(torch.Generator())
    x, x_test = ((torch.from_numpy(a).float() / 255 - 0.1307) / 0.3081 for a in (data.X_train, data.X_test))
    y, y_test = (torch.from_numpy(a).long() for a in (data.y_train, data.y_test))
    targets = torch.full((len(y), 10), -1.0).scatter_(1, y[:, None], 1.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    rows = []
    for epoch in range(epochs + 1):
        squares = [0.0, 0.0, 0.0]
        if epoch > 0:
            order = torch.randperm(len(x), generator=generator)
            for batch in order.split(100):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(network(x[batch]), targets[batch]).backward()
                for layer in range(3):
                    squares[layer] += float(network[2 * layer].weight.grad.square().mean())
                optimizer.step()
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        row = {"epoch": epoch, "exact": accuracy(network, x_test, y_test)}
        row["gradient rms"] = [(s / 600) ** 0.5 for s in squares]
        for floor in FLOORS:
            restored, payloads = compressed(network, state, wc.CompressionConfig(floor_bits=floor))
            scored.load_state_dict(restored)
            row[floor] = (bits_per_weight(payloads), bits_per_weight(payloads, False), accuracy(scored, x_test, y_test))
        row["entropy"] = {
            (m, f): [wc.estimate_entropy(state[f"{2 * k}.weight"], bits=m, sample_fraction=f) for k in range(3)]
            for m in (4, 6, 8)
            for f in (0.03, 1.0)
        }
        if epoch == epochs:
            row["fixed"] = []
            for bits in FIXED_BITS:
                scored.load_state_dict(compressed(network, state, wc.CompressionConfig(bits=bits))[0])
                row["fixed"].append(accuracy(scored, x_test, y_test))
        rows.append(row)
    return rows


def summarise(runs: list[list[dict]]) -> list[dict]:
    table = []
    for floor in FLOORS:
        rows = [row for run in runs for row in run[1:]]
        bits = np.array([row[floor][0] for row in rows])
        lost = np.array([row["exact"] - row[floor][2] for row in rows])
        table.append(
            {
                "c": floor,
                "bits/weight": bits.mean(),
                "thesis bits": THESIS[floor][0],
                "ratio": 32 / bits.mean(),
                "thesis ratio": THESIS[floor][1],
                "log2 levels": np.mean([row[floor][1] for row in rows]),
                "exact accuracy, last": np.mean([run[-1]["exact"] for run in runs]),
                "compressed, last": np.mean([run[-1][floor][2] for run in runs]),
                "points lost, mean": lost.mean(),
                "mean of sizes": np.abs(lost).mean(),
                "worst": lost.max(),
            }
        )
    return table


def draw(runs: list[list[dict]]) -> None:
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
    for floor, colour in zip(FLOORS, ("tab:blue", "tab:red"), strict=True):
        ax.plot(epochs, [row[floor][0] for row in run[1:]], color=colour, label=f"c = {floor:g}, Huffman coded")
        ax.plot(epochs, [row[floor][1] for row in run[1:]], "--", color=colour, label=f"c = {floor:g}, log2 of levels")
    ax.set(title="3.5: bits per weight", xlabel="epoch", ylabel="bits", ylim=(0, None))
    ax.legend(fontsize=8)
    save_figure(figure, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    data = load_mnist(options.data_dir)
    runs = [train(data, options.epochs, seed) for seed in range(options.seeds)]
    print_rows(summarise(runs))
    fixed = np.mean([run[-1]["fixed"] for run in runs], 0)
    print("fixed bits, last epoch:", ", ".join(f"{b}: {a:.2f}" for b, a in zip(FIXED_BITS, fixed, strict=True)))
    draw(runs)


if __name__ == "__main__":
    main()
