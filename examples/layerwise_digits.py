"""A convolutional network on handwritten digits, trained end to end and layer by layer, in under a minute.

python examples/layerwise_digits.py                    # greedy, local errors, random robin and backpropagation
python examples/layerwise_digits.py --plot layers.png  # and the accuracy of every unit's head
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import layerwise
from layerwise.data import make_loaders


def make_network(width: int = 32) -> nn.Sequential:
    """Four convolutions and a classifier; `layerwise` makes a unit of each convolution."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(width if i else 1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def methods(epochs: int) -> dict[str, layerwise.Method]:
    adam = layerwise.OptimizerSpec("adam", 2e-3, milestones=(0.5, 0.75), gamma=0.25)
    head, predsim = layerwise.ConvHead(k=2), layerwise.PredSimHead()
    units = 4
    return {
        "backpropagation": layerwise.Method("backpropagation", [layerwise.Stage(((0, units - 1),), epochs)], optimizer=adam),
        "bottom up": layerwise.Method("bottom up", lambda n: layerwise.bottom_up(n, epochs), head=head, optimizer=adam),
        "local errors": layerwise.Method(
            "local errors", lambda n: layerwise.simultaneous(n, epochs), head=predsim, loss="predsim", optimizer=adam
        ),
        "random robin": layerwise.Method(
            "random robin", lambda n: layerwise.robin(n, epochs // 2, 2, shuffle=True), head=head, optimizer=adam
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="per unit (default: 8)")
    parser.add_argument("--plot", metavar="FILE", help="draw the accuracy of every unit's head")
    args = parser.parse_args()
    data = make_loaders("digits", batch_size=64)
    batch = next(iter(data.train))
    rows, curves = [], {}
    for name, method in methods(args.epochs).items():
        torch.manual_seed(0)
        trainer = layerwise.LayerwiseTrainer(make_network(), method, classes=data.classes)
        layerwise.assert_isolated(trainer, batch)  # every loss reaches its own units and nothing else
        start = time.perf_counter()
        trainer.fit(data.train)
        seconds = time.perf_counter() - start
        curves[name] = {window[1]: trainer.evaluate(data.test, window[1]) for window in sorted(trainer.trainings)}
        rows.append(
            {
                "method": name,
                "test accuracy %": 100 * trainer.evaluate(data.test),
                "of all heads together %": 100 * layerwise.accuracy(layerwise.make_ensemble(trainer), data.test),
                "kept for the backward pass, MB": largest_step(trainer, batch[0]) / 1e6,
                "seconds": seconds,
            }
        )
    print(layerwise.format_table(rows))
    if args.plot:
        plot(curves, args.plot)


def largest_step(trainer: layerwise.LayerwiseTrainer, inputs: torch.Tensor) -> int:
    """Bytes that autograd keeps in the costliest window's forward pass."""
    sizes = []
    for first, last in trainer.trainings:
        subnet = trainer.trainings[first, last].subnet.train()
        state = trainer.feednet.advance(inputs, 0, first)
        sizes.append(layerwise.saved_bytes(lambda s=subnet, x=state: s(x)[0], exclude=subnet.parameters()))
    return max(sizes)


def plot(curves: dict[str, dict[int, float]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in curves.items():
        axes.plot([i + 1 for i in points], [100 * a for a in points.values()], marker="o", label=name)
    axes.set(xlabel="unit that the head sits on", ylabel="test accuracy %", xticks=range(1, 5))
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
