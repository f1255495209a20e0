"""What layers learn: figures 5.6, 5.9, 5.11, 5.12, 5.14, 5.21 and 6.3 of the thesis.

``python benchmarks/layerwise_probes.py 5.6 5.21 ... [--mnist FOLDER] [--cifar10 FOLDER] [--epochs E] [--seeds S] [--quick]
[--figures]``; the folders hold MNIST's four IDX files and ``cifar10-jpeg.tar.xz`` (JPEG files). Without a name, all figures.

- 5.6: least squares distance by layer and epoch of 784-392-196-50-10, ReLU, mean squared error against one-hot codes.
- 5.21: conditional entropy of the same network's selections, and the error, at a very low learning rate.
- 5.9: a convolutional network of ten layers on CIFAR-10, four classes on two principal components.
- 5.14: k-redundancy by layer of VGG-13 with a fraction of its channels on CIFAR-10 after 1/7, 3/7, 5/7 and all of the epochs, as
  40, 120, 200 and 280 in the thesis; least squares distance and conditional entropy beside it, in the table.
- 6.3: stable rank by layer of that network trained by backpropagation, bottom-up and by random robin.
- 5.11, 5.12: pure Voronoi maps of a sinusoidal boundary, by frequency and by number of samples, beside the map that splitting
  alone gives.

The thesis states no batch size, first weights or rate for 5.6 and 5.14, and no augmentation is used here. Probes look at training
images. Finished trainings are kept in a JSON file and not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import Skipped, machine, print_rows
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise import LayerwiseTrainer, Method, OptimizerSpec, bottom_up, robin
from layerwise.probes import (
    KRedundancy,
    ProbeCallback,
    ProbeTable,
    Projection,
    plot_by_epoch,
    plot_by_layer,
    plot_scatter,
    plot_voronoi,
    probe,
    pure_voronoi_map,
    save_figure,
)
from platonic.datasets import load
from platonic_core.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
BATCH = 128
PROBED = 10_000  # training images that sums see
DRAWN = 2_000  # and those that take part in k-redundancy and scatters
CLASSES_SHOWN = (0, 1, 4, 8)  # airplane, automobile, deer, ship
VGG13 = (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


@dataclass(frozen=True)
class Options:
    mnist: Path | None
    cifar10: Path | None
    epochs: int | None
    seeds: int
    width: float
    quick: bool
    figures: Path | None


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Images:
    """Standardised pixels and classes."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    names: list[str]

    def first(self, count: int) -> Images:
        return Images(self.x[:count], self.y[:count], self.x_test[:count], self.y_test[:count], self.names)


def load_images(name: str, folder: Path | None, quick: bool) -> Images:
    """In an order that has nothing to do with classes."""
    if folder is None:
        raise Skipped(f"needs --{name} FOLDER")
    try:
        data = load("mnist" if name == "mnist" else "cifar10-jpeg.tar.xz", folder)
    except FileNotFoundError as error:
        raise Skipped(str(error)) from None
    names, y = np.unique(data.y_train, return_inverse=True)
    y_test = np.searchsorted(names, data.y_test)
    generator = torch.Generator().manual_seed(0)
    order, order_test = (torch.randperm(len(part), generator=generator) for part in (y, y_test))
    x, x_test = (torch.from_numpy(np.ascontiguousarray(part)).float() for part in (data.X_train, data.X_test))
    if len(data.image_shape) == 3:
        x, x_test = (part.reshape(-1, *data.image_shape).permute(0, 3, 1, 2).contiguous() for part in (x, x_test))
    std, centre = torch.std_mean(x, (0, 2, 3) if x.dim() == 4 else None, keepdim=x.dim() == 4)
    x, x_test = (x - centre) / std, (x_test - centre) / std
    y, y_test = torch.from_numpy(y), torch.from_numpy(y_test)
    images = Images(x[order], y[order], x_test[order_test], y_test[order_test], [str(n) for n in names])
    return images.first(2000) if quick else images


class Batches:
    """Batches of (x, y), in a new order every time if shuffled; the order comes from torch's global generator."""

    def __init__(self, x: Tensor, y: Tensor, *, shuffle: bool = False, size: int = BATCH) -> None:
        self.x, self.y, self.shuffle, self.size = x, y, shuffle, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.y)) if self.shuffle else torch.arange(len(self.y))
        for rows in order.split(self.size):
            yield self.x[rows], self.y[rows]


# ------------------------------------------------------------------------------------------------------------ networks


def make_mlp(seed: int) -> tuple[nn.Sequential, list[str]]:
    """784-392-196-50-10, and the names that begin its layers."""
    torch.manual_seed(seed)
    sizes = (784, 392, 196, 50, 10)
    layers = {f"linear{i}": nn.Linear(a, b) for i, (a, b) in enumerate(pairwise(sizes), 1)}
    modules = {
        name: m for n, layer in layers.items() for name, m in ((n, layer), (n.replace("linear", "relu"), nn.ReLU()))
    }
    modules.popitem()
    return nn.Sequential(OrderedDict(modules)), list(layers)


def make_convolutional(plan: tuple[int | str, ...], hidden: tuple[int, ...], width: float, seed: int) -> Any:
    """3 x 3 convolutions with batch normalisation and ReLU, 2 x 2 max-pooling ("M"), then linear layers."""
    torch.manual_seed(seed)
    modules: dict[str, nn.Module] = {}
    channels, names = 3, []
    for step in plan:
        if step == "M":
            modules[f"pool{len(modules)}"] = nn.MaxPool2d(2)
            continue
        out = max(4, round(int(step) * width))
        names.append(f"conv{len(names) + 1}")
        modules[names[-1]] = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        modules[f"norm{len(names)}"], modules[f"relu{len(names)}"] = nn.BatchNorm2d(out), nn.ReLU()
        channels = out
    modules["average"], modules["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    for i, size in enumerate((*(max(16, round(h * width)) for h in hidden), 10)):
        names.append(f"linear{i + 1}")
        modules[names[-1]] = nn.Linear(channels, size)
        if i < len(hidden):
            modules[f"active{i + 1}"] = nn.ReLU()
        channels = size
    return nn.Sequential(OrderedDict(modules)), names


def train(
    model: nn.Module,
    images: Images,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    after_epoch: Callable[[int, float], Any],
) -> None:
    """`after_epoch` gets the number of epochs done and the mean loss while it changed."""
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for x, y in Batches(images.x, images.y, shuffle=True):
            optimizer.zero_grad()
            value = loss(model(x), y)
            value.backward()
            optimizer.step()
            total += value.item() * len(y)
        after_epoch(epoch, total / len(images.y))


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in Batches(images.x_test, images.y_test, size=1000))
    return right / len(images.y_test)


def squared_error(scores: Tensor, y: Tensor) -> Tensor:
    """Mean over samples of the squared distance to the one-hot code: what the least squares distance is the least of."""
    return (scores - F.one_hot(y, scores.shape[1])).square().sum(1).mean()


# ------------------------------------------------------------------------------------------------------------- records


@dataclass
class Run:
    """The tables of one training, by epoch or by name, and what was recorded beside them."""

    tables: dict[Any, ProbeTable]
    scalars: dict[Any, dict[str, Any]]
    note: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        tables = {
            key: {
                "rows": table.rows,
                "trends": table.trends,
                "projections": {
                    layer: [[[float(f"{x:.3g}") for x in row] for row in p.points.tolist()], p.labels.tolist(), p.share]
                    for layer, p in table.projections.items()
                },
            }
            for key, table in self.tables.items()
        }
        return {"tables": tables, "scalars": self.scalars, "note": self.note}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Run:
        def key(text: str) -> Any:
            return int(text) if text.isdigit() else text

        tables = {
            key(name): ProbeTable(
                t["rows"],
                t["trends"],
                {int(i): Projection(torch.tensor(p), torch.tensor(l), s) for i, (p, l, s) in t["projections"].items()},
            )
            for name, t in stored["tables"].items()
        }
        return cls(tables, {key(k): v for k, v in stored["scalars"].items()}, stored["note"])


class Record:
    """Finished runs in a JSON file that grows with each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}

    def get(self, name: str, start: Callable[[], Run]) -> Run:
        if name not in self.runs:
            print(f"{name}: training", flush=True)
            begin = time.perf_counter()
            run = start()
            run.note["seconds"] = round(time.perf_counter() - begin, 1)
            self.runs[name] = run.to_json()
            write_atomically(self.path, json.dumps({"machine": machine(), "runs": self.runs}).encode())
        return Run.from_json(json.loads(json.dumps(self.runs[name])))


def summarise(runs: list[Run], key: Any, measures: list[str], *, list_violations: bool = True) -> None:
    """Means over seeds by layer of the tables under `key`, and where layers go against a measure's trend."""
    tables = [run.tables[key] for run in runs]
    rows = []
    for i, first in enumerate(tables[0].rows):
        row = {name: first[name] for name in ("layer", "name", "shape")}
        for measure in measures:
            values = [table.rows[i][measure] for table in tables]
            row[measure] = "" if values[0] is None else mean(values)
        rows.append(row)
    print_rows(rows)
    for seed, table in enumerate(tables):
        found = [violation for violation in table.violations() if violation.measure in measures]
        print(f"  seed {seed}: {len(found)} violations")
        for violation in found if list_violations else ():
            print(f"    {violation}")


# ------------------------------------------------------------------------------------------------------------- figures


def probe_mlp(options: Options, record: Record, measure: str, rate: float, momentum: float, epochs: int) -> list[Run]:
    images = load_images("mnist", options.mnist, options.quick)
    epochs = options.epochs or (3 if options.quick else epochs)

    def run(seed: int) -> Run:
        model, names = make_mlp(seed)
        watch = ProbeCallback(Batches(images.x[:PROBED], images.y[:PROBED], size=1000), measures=measure, spec=names)
        watch.record(model)
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=momentum)
        train(model, images, epochs, optimizer, squared_error, lambda _, mse: watch.record(model, mse=mse))
        return Run(watch.tables, watch.scalars, {"test accuracy": accuracy(model, images)})

    setting = f"mlp, {measure}, rate {rate:g}, {epochs} epochs, {len(images.y)} images"
    runs = [record.get(f"{setting}, seed {seed}", lambda seed=seed: run(seed)) for seed in range(options.seeds)]
    for key in (0, epochs):
        print(f"\n{setting}, after epoch {key}, mean of {len(runs)} seeds")
        summarise(runs, key, [measure], list_violations=key == epochs)
    print("test accuracies:", [run.note["test accuracy"] for run in runs])
    return runs


def figure_5_6(options: Options, record: Record) -> Any:
    runs = probe_mlp(options, record, "lsd", 0.01, 0.9, 20)
    return plot_by_epoch(runs[0], "lsd")


def figure_5_21(options: Options, record: Record) -> Any:
    runs = probe_mlp(options, record, "conditional_entropy", 3e-3, 0.0, 50)
    return plot_by_epoch(runs[0], "conditional_entropy", scalar="mse", layers=(1, 2, 3))


def figure_5_9(options: Options, record: Record) -> Any:
    images = load_images("cifar10", options.cifar10, options.quick)
    epochs = options.epochs or (1 if options.quick else 10)
    plan = (64, 64, "M", 128, 128, 128, "M", 256, 256, 256, 256)
    shown = torch.isin(images.y, torch.tensor(CLASSES_SHOWN))

    def run() -> Run:
        model, names = make_convolutional(plan, (), options.width, 0)
        train(model, images, epochs, torch.optim.AdamW(model.parameters(), 1e-3), F.cross_entropy, _print_loss)
        seen = Batches(images.x[shown][:PROBED], images.y[shown][:PROBED], size=500)
        table = probe(model, seen, measures=("pca", "k_redundancy"), max_samples=1200, spec=names)
        return Run({"trained": table}, {}, {"test accuracy": accuracy(model, images)})

    setting = f"cnn10, width {options.width:g}, {epochs} epochs, {len(images.y)} images"
    found = record.get(setting, run)
    print(f"\n{setting}: test accuracy {found.note['test accuracy']:.3f}")
    summarise([found], "trained", ["pca_share", "k_redundancy_10"])
    return plot_scatter(found.tables["trained"], layers=(0, 2, 4, 6, 8, 10), class_names=images.names)


def _print_loss(epoch: int, loss: float) -> None:
    print(f"  epoch {epoch}: loss {loss:.3f}", flush=True)


def figure_5_14(options: Options, record: Record) -> Any:
    images = load_images("cifar10", options.cifar10, options.quick)
    epochs = options.epochs or (4 if options.quick else 14)
    looks = sorted({max(1, round(epochs * part)) for part in (1 / 7, 3 / 7, 5 / 7, 1)})
    measures = ("lsd", "conditional_entropy", KRedundancy(k=(5, 10, 20)))

    def run(seed: int) -> Run:
        model, names = make_convolutional(VGG13, (512, 512), options.width, seed)
        loader = Batches(images.x[:PROBED], images.y[:PROBED], size=500)
        watch = ProbeCallback(loader, measures=measures, max_samples=DRAWN, spec=names)

        def look(epoch: int, loss: float) -> None:
            _print_loss(epoch, loss)
            if epoch in looks:
                watch.record(model, epoch=epoch, loss=loss)

        train(model, images, epochs, torch.optim.AdamW(model.parameters(), 1e-3), F.cross_entropy, look)
        return Run(watch.tables, watch.scalars, {"test accuracy": accuracy(model, images)})

    setting = f"vgg13, width {options.width:g}, {epochs} epochs, {len(images.y)} images"
    runs = [record.get(f"{setting}, seed {seed}", lambda seed=seed: run(seed)) for seed in range(options.seeds)]
    shown = [f"k_redundancy_{k}" for k in (5, 10, 20)]
    for epoch in looks:
        print(f"\n{setting}, after epoch {epoch}, mean of {len(runs)} seeds")
        summarise(runs, epoch, ["lsd", "conditional_entropy", *shown], list_violations=epoch == epochs)
    print("test accuracies:", [run.note["test accuracy"] for run in runs])
    return plot_by_layer({f"epoch {epoch}": runs[0].tables[epoch] for epoch in looks}, shown)


def figure_6_3(options: Options, record: Record) -> Any:
    images = load_images("cifar10", options.cifar10, options.quick)
    epochs = options.epochs or (1 if options.quick else 5)
    batches = Batches(images.x, images.y, shuffle=True)

    def run(way: str) -> Run:
        model, names = make_convolutional(VGG13, (512, 512), options.width, 0)
        if way == "backprop":
            train(model, images, epochs, torch.optim.AdamW(model.parameters(), 1e-3), F.cross_entropy, _print_loss)
        else:
            units = len(names)
            schedule = bottom_up(units, epochs) if way == "bottom-up" else robin(units, epochs, shuffle=True)
            method = Method(way, schedule, optimizer=OptimizerSpec("adamw", 1e-3))
            LayerwiseTrainer(model, method, classes=10, spec=names).fit(batches)
        table = probe(model, Batches(images.x[:2], images.y[:2]), measures="stable_rank", spec=names)
        return Run({way: table}, {}, {"test accuracy": accuracy(model, images)})

    setting = f"ranks of vgg13, width {options.width:g}, {epochs} epochs a unit, {len(images.y)} images"
    ways = ("backprop", "bottom-up", "random robin")
    found = {way: record.get(f"{setting}, {way}", lambda way=way: run(way)) for way in ways}
    for way, result in found.items():
        print(f"\n{setting}, {way}: test accuracy {result.note['test accuracy']:.3f}")
        summarise([result], way, ["stable_rank"])
    return plot_by_layer({way: result.tables[way] for way, result in found.items()}, "stable_rank")


def sinusoid(samples: int, frequency: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points of a square, and the side of a sine curve with so many periods that they lie on."""
    Z = np.random.default_rng(seed).uniform(-1, 1, (samples, 2))
    return Z, (Z[:, 1] > 0.5 * np.sin(np.pi * frequency * Z[:, 0])).astype(np.int64)


def draw_maps(problems: dict[str, tuple[int, float]], seeds: int) -> Any:
    rows, shown = [], {}
    for name, (samples, frequency) in problems.items():
        for seed in range(seeds):
            Z, y = sinusoid(samples, frequency, seed)
            begin = time.perf_counter()
            found = pure_voronoi_map(Z, y)
            seconds = time.perf_counter() - begin
            split = pure_voronoi_map(Z, y, method="split")
            row = {
                "boundary": name,
                "seed": seed,
                "cells": len(found.labels),
                "bits": found.entropy,
                "seconds": seconds,
            }
            rows.append(row | {"cells, splitting alone": len(split.labels), "bits, splitting alone": split.entropy})
            if seed == 0:
                shown[name] = (Z, y, found)
    print_rows(rows)
    return plot_voronoi(shown)


def figure_5_11(options: Options, record: Record) -> Any:
    samples = 200 if options.quick else 1000
    return draw_maps({f"frequency {f}": (samples, f) for f in (1, 2, 4, 8)}, options.seeds)


def figure_5_12(options: Options, record: Record) -> Any:
    counts = (50, 100, 200) if options.quick else (25, 100, 400, 1600)
    return draw_maps({f"m = {m}": (m, 1) for m in counts}, options.seeds)


FIGURES = {
    "5.6": figure_5_6,
    "5.9": figure_5_9,
    "5.11": figure_5_11,
    "5.12": figure_5_12,
    "5.14": figure_5_14,
    "5.21": figure_5_21,
    "6.3": figure_6_3,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="FIGURE", help=f"{', '.join(FIGURES)}; all without a name")
    parser.add_argument("--mnist", type=Path, metavar="FOLDER")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER")
    parser.add_argument("--epochs", type=int, help="20, 50, 10, 14 and 5 for 5.6, 5.21, 5.9, 5.14 and 6.3 by default")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--width", type=float, default=0.25, help="of convolutional networks, as a part of the channels"
    )
    parser.add_argument("--quick", action="store_true", help="2,000 images, a few epochs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument(
        "--figures",
        type=Path,
        nargs="?",
        const=ROOT / "docs" / "figures",
        metavar="FOLDER",
        help="draw, here by default",
    )
    given = parser.parse_args()
    if unknown := set(given.names) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    options = Options(given.mnist, given.cifar10, given.epochs, given.seeds, given.width, given.quick, given.figures)
    for folder in filter(None, (given.results, given.figures)):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    record = Record(given.results / "layerwise_probes.json")
    for name in given.names or FIGURES:
        print(f"\n== figure {name}")
        try:
            figure = FIGURES[name](options, record)
        except Skipped as reason:
            print(f"skipped: {reason}")
            continue
        if given.figures is not None:
            save_figure(figure, given.figures / f"figure_{name.replace('.', '_')}.png")


if __name__ == "__main__":
    main()
