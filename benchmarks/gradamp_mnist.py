"""Gradient amplification on MNIST: table 4.1 of the thesis, and softmax against the amplified losses.

``python benchmarks/gradamp_mnist.py outputs|losses --data-dir FOLDER``; FOLDER holds MNIST's four IDX files. One thread.

*outputs*, table 4.1: 784-392-50-10, ReLU in the hidden layers, output activations y by sigmoid, tanh and linear, and the
gradient y - t of section 4.3 at the output for all three: targets {0, 1} for the sigmoid, {-1, 1} for the others. So the
losses are the cross-entropy (the tanh's that of the probability (1 + y) / 2) and half of the squared error. As in the
thesis the learning rate is fixed, there is no dropout, batch normalisation or weight decay, and a training has converged
in the epoch of its lowest test error, the first of several. The thesis does not state batches, momentum, first weights
or the scale of pixels: batches of 128 and momentum 0.9 are those of its network of this size in section 7.9, uniform
first weights within +-1 / sqrt(inputs) and pixels from 0 to 1 those that reproduce its figures of section 3.1 (docs/results.md).

*losses*: a small convolutional network under softmax and cross-entropy, exp-GA, pow3-GA and linear outputs with the
targets of table 4.2, exp-GA and pow3-GA also with those of section 4.10, which trains for ten epochs at a fixed rate, too.

Every candidate gets the same tuning: one training for each learning rate of one grid on the first 50,000 training
images; the rate of the lowest error on the other 10,000, averaged over the second half of the epochs, trains on all 60,000
images. Test errors are printed, not used. Finished trainings are kept in a JSON file and not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from common import Skipped, machine, print_rows
from torch import nn
from trained_networks import HIDDEN, Images, load_images

from gradamp import PRESETS, make_loss
from platonic_core.figures import new_figure, save_figure
from platonic_core.files import write_atomically

FOLDER = Path(__file__).resolve().parent
BATCH = 128
MOMENTUM = 0.9
HELD_OUT = 10_000
OUTPUTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {  # activation and target of other classes
    "sigmoid": (torch.sigmoid, 0.0),
    "tanh": (torch.tanh, -1.0),
    "linear": (lambda x: x, -1.0),
}
TABLE_4_1 = {"sigmoid": (1.8, 98.5), "tanh": (1.7, 95.0), "linear": (1.7, 73.5)}  # error in %, epochs
LOSSES: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: make_loss(name) for name in ("cross_entropy", "exp_ga", "pow3_ga", "linear_mse")},
    **{f"{name}, section 4.10": PRESETS[f"cnn10/{name}"].make_loss for name in ("exp_ga", "pow3_ga")},
}

Errors = list[float]  # misclassified images in per cent, by epoch


def train_perceptron(images: Images, output: str, rate: float, seed: int) -> Iterator[float]:
    """The error on the test images after every epoch."""
    activate, t_neg = OUTPUTS[output]
    torch.manual_seed(seed)
    layers = [nn.Linear(*sizes) for sizes in zip((images.x.shape[1], *HIDDEN), (*HIDDEN, 10), strict=True)]
    weights = [layer.weight.detach().t().contiguous() for layer in layers]  # [inputs, outputs]
    biases = [layer.bias.detach() for layer in layers]
    weight_steps, bias_steps = ([torch.zeros_like(p) for p in parameters] for parameters in (weights, biases))
    targets = torch.full((len(images.y), 10), t_neg).scatter_(1, images.y[:, None], 1.0)

    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        """The inputs of every layer, then the outputs before their activation."""
        values = [x]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            values.append(torch.addmm(bias, values[-1], weight).relu_())
        return [*values, torch.addmm(biases[-1], values[-1], weights[-1])]

    while True:
        for batch in torch.randperm(len(images.x)).split(BATCH):
            *inputs, outputs = forward(images.x[batch])
            delta = activate(outputs) - targets[batch]
            for layer in (2, 1, 0):
                x, step = inputs[layer], -rate / len(batch)
                below = torch.mm(delta, weights[layer].t()).mul_(x > 0) if layer else delta
                weight_steps[layer].addmm_(x.t(), delta, beta=MOMENTUM, alpha=step)
                bias_steps[layer].mul_(MOMENTUM).add_(delta.sum(0), alpha=step)
                weights[layer] += weight_steps[layer]
                biases[layer] += bias_steps[layer]
                delta = below
        yield error_of(forward(images.x_test)[-1], images.y_test)


def make_convolutional() -> nn.Sequential:
    """28 x 28 pixels to maps of 9 x 9, 5 x 5 and 3 x 3."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 6, stride=3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 3 * 3, 10),
    )  # fmt: skip


def train_convolutional(images: Images, name: str, rate: float, seed: int) -> Iterator[float]:
    """The error on the test images after every epoch."""
    torch.manual_seed(seed)
    network, loss = make_convolutional(), LOSSES[name]()
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=MOMENTUM, fused=True)
    x, x_test = (part.view(-1, 1, images.side, images.side) for part in (images.x, images.x_test))
    while True:
        network.train()
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss(network(x[batch]), images.y[batch]).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            yield error_of(torch.cat([network(part) for part in x_test.split(1000)]), images.y_test)


def error_of(outputs: torch.Tensor, classes: torch.Tensor) -> float:
    """Misclassified images in per cent; all of them where training diverged."""
    if not bool(outputs.isfinite().all()):
        return 100.0
    return 100 * int((outputs.argmax(1) != classes).sum()) / len(classes)


@dataclass(frozen=True)
class Comparison:
    """What is trained, and what all candidates are tuned with."""

    train: Callable[[Images, str, float, int], Iterator[float]]
    candidates: tuple[str, ...]
    rates: tuple[float, ...]
    tuning_epochs: int
    epochs: int
    seeds: int
    levels: tuple[float, float]  # errors in per cent, the epochs to which are counted


COMPARISONS = {
    "outputs": Comparison(
        train_perceptron, tuple(OUTPUTS), (0.005, 0.01, 0.02, 0.04, 0.08, 0.16), 30, 100, 20, (2.0, 1.6)
    ),
    "losses": Comparison(
        train_convolutional, tuple(LOSSES), (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0), 5, 10, 5, (1.5, 1.2)
    ),
}


class Record:
    """The errors by epoch of every finished training, in a JSON file that grows with each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": machine(), "trainings": {}}
        if path.exists():
            self.content = json.loads(path.read_text())

    def errors(self, training: str, epochs: int, start: Callable[[], Iterator[float]]) -> Errors:
        """Those of `training`, which is started if it is not in the file."""
        key = f"{training}, {epochs} epochs"
        known = self.content["trainings"]
        if key not in known:
            begin = time.perf_counter()
            errors = run_epochs(start(), epochs)
            seconds = time.perf_counter() - begin
            known[key] = {"errors": errors, "seconds": round(seconds, 1)}
            write_atomically(self.path, json.dumps(self.content, indent=1).encode())
            print(f"{key}: lowest {min(errors):.2f} %, last {errors[-1]:.2f} %, {seconds:.0f} s", flush=True)
        return known[key]["errors"]


def run_epochs(training: Iterator[float], epochs: int) -> Errors:
    """Not gone on with once it has diverged: its errors stay at 100 %."""
    errors: Errors = []
    while len(errors) < epochs and 100.0 not in errors:
        errors.append(next(training))
    return errors + [100.0] * (epochs - len(errors))


def tune(comparison: Comparison, name: str, images: Images, record: Record) -> float:
    """The learning rate of the lowest error on held-out training images."""
    kept, held_out = (slice(0, -HELD_OUT), slice(-HELD_OUT, None))
    parts = Images(images.x[kept], images.y[kept], images.x[held_out], images.y[held_out])
    scores = {}
    for rate in comparison.rates:
        errors = record.errors(
            f"{name}, rate {rate:g}, seed 0, validation",
            comparison.tuning_epochs,
            lambda rate=rate: comparison.train(parts, name, rate, 0),
        )
        scores[rate] = mean(errors[len(errors) // 2 :])
    best = min(comparison.rates, key=lambda rate: scores[rate])
    print(f"{name}: " + ", ".join(f"rate {rate:g} {score:.2f} %" for rate, score in scores.items()), flush=True)
    return best


def compare(comparison: Comparison, images: Images, record: Record) -> dict[str, tuple[float, list[Errors]]]:
    """By candidate: its learning rate and the test errors by epoch of every seed."""
    rates = {name: tune(comparison, name, images, record) for name in comparison.candidates}
    runs: dict[str, list[Errors]] = {name: [] for name in rates}
    for seed in range(comparison.seeds):
        for name, rate in rates.items():
            errors = record.errors(
                f"{name}, rate {rate:g}, seed {seed}, test",
                comparison.epochs,
                lambda name=name, rate=rate, seed=seed: comparison.train(images, name, rate, seed),
            )
            runs[name].append(errors)
    return {name: (rates[name], runs[name]) for name in rates}


def epochs_to(level: float, errors: Errors) -> float:
    """The first epoch at or below `level`, infinity if there is none."""
    return next((epoch for epoch, error in enumerate(errors, 1) if error <= level), float("inf"))


def summarise(found: dict[str, tuple[float, list[Errors]]], levels: tuple[float, ...]) -> list[dict[str, Any]]:
    """Medians over seeds, and ranges."""
    rows = []
    for name, (rate, runs) in found.items():
        last, lowest = [errors[-1] for errors in runs], [min(errors) for errors in runs]
        converged = [epochs_to(min(errors), errors) for errors in runs]
        row = {
            "candidate": name, "rate": rate, "seeds": len(runs),
            "last error": f"{median(last):.2f} ({min(last):.2f} to {max(last):.2f})",
            "lowest error": f"{median(lowest):.2f} ({min(lowest):.2f} to {max(lowest):.2f})",
            "in epoch": f"{median(converged):g} ({min(converged):g} to {max(converged):g})",
        }  # fmt: skip
        for level in levels:
            row[f"epochs to {level:g} %"] = median(epochs_to(level, errors) for errors in runs)
        if name in TABLE_4_1:
            row |= dict(zip(("thesis's error", "thesis's epoch"), TABLE_4_1[name], strict=True))
        rows.append(row)
    return rows


def draw(found: dict[str, tuple[float, list[Errors]]], path: Path) -> None:
    """Medians over seeds of the test error by epoch, and the range that the seeds span."""
    from matplotlib.ticker import MaxNLocator  # only for the figure

    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    for name, (rate, runs) in found.items():
        by_epoch = list(zip(*runs, strict=True))
        epochs = range(1, len(by_epoch) + 1)
        (line,) = axes.plot(epochs, [median(errors) for errors in by_epoch], label=f"{name}, rate {rate:g}")
        low, high = ([pick(errors) for errors in by_epoch] for pick in (min, max))
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, lw=0)
    seeds = len(next(iter(found.values()))[1])
    axes.set(xlabel="epoch", ylabel=f"test error, %, median and range of {seeds} seeds", yscale="log")
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--only", metavar='"NAME; NAME"', help="these candidates alone")
    parser.add_argument("--seeds", type=int, help="trainings of every candidate with its rate, 20 or 5 by default")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "docs" / "figures", help="folder of the figure")
    options = parser.parse_args()
    for folder in (options.results, options.out):
        folder.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # steps of weights whose pixels are seldom lit
    try:
        _, images = load_images(options.data_dir)
    except Skipped as reason:
        raise SystemExit(str(reason)) from None
    comparison = COMPARISONS[options.comparison]
    if options.only is not None:
        chosen = tuple(name.strip() for name in options.only.split(";"))
        if unknown := set(chosen) - set(comparison.candidates):
            parser.error(f"unknown {', '.join(sorted(unknown))}; there are {'; '.join(comparison.candidates)}")
        comparison = replace(comparison, candidates=chosen)
    if options.seeds is not None:
        comparison = replace(comparison, seeds=options.seeds)
    stem = f"gradamp_{options.comparison}"
    found = compare(comparison, images, Record(options.results / f"{stem}.json"))
    print_rows(summarise(found, comparison.levels))
    draw(found, options.out / f"{stem}.png")


if __name__ == "__main__":
    main()
