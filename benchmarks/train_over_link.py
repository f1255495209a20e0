"""Training under DistributedDataParallel over a slow link: test accuracy by steps and by seconds.

Each rank takes its share of every batch of 100 images, so that the sequence of batches is the same for any number of
ranks. The perceptron is trained as in trained_networks.py (tanh, squared error, momentum), the convolutional network with
Adam. Seconds are rank 0's, of the whole step (forward, backward, exchange, update), without the evaluations. What is
evaluated is rank 0's network, also between two averagings.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradient_exchange as exchange
import torch
import torch.distributed as dist
from slow_link import Rank, SlowLink
from torch.nn.parallel import DistributedDataParallel
from trained_networks import BATCH, Images, Recipe, accuracy, load_images, make_convolutional, make_perceptron, prepare

EVALUATIONS = 24  # over a training
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _make_task(model: str, images: Images, seed: int) -> tuple[Images, torch.nn.Module, torch.optim.Optimizer, Loss]:
    if model == "mlp":
        recipe = Recipe()
        network = make_perceptron(images.x.shape[1], recipe, torch.Generator().manual_seed(seed))
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            network.parameters(), lr=recipe.rate, momentum=recipe.momentum, weight_decay=recipe.decay
        )
        return prepare(images, recipe), network, optimizer, _squared_error
    torch.manual_seed(seed)
    network = make_convolutional()
    shape = (-1, 1, images.side, images.side)
    images = Images(images.x.view(shape), images.y, images.x_test.view(shape), images.y_test)
    return images, network, torch.optim.Adam(network.parameters(), lr=2e-3), torch.nn.functional.cross_entropy


def _squared_error(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    targets = torch.full_like(outputs, -1.0).scatter_(1, y[:, None], 1.0)
    return torch.nn.functional.mse_loss(outputs, targets)


def train(
    rank: Rank, model: str, wanted: Sequence[str], steps: int, seeds: int, data_dir: Path | None, threads: int
) -> dict[tuple[str, int], list[dict[str, float]]]:
    """In each rank's process: the curve of every method and seed."""
    torch.set_num_threads(threads)
    _, images = load_images(data_dir)
    curves = {}
    for name, method in exchange.TRAINING.items():
        for seed in range(seeds) if not wanted or name in wanted else ():
            curves[name, seed] = _train(rank, method, _make_task(model, images, seed), steps, seed)
            if rank.rank == 0:
                end = curves[name, seed][-1]
                print(
                    f"{rank.link} {rank.ranks} ranks {model}: {name}, seed {seed}: {end['accuracy']:.2f} % "
                    f"in {end['seconds']:.3g} s",
                    file=sys.stderr,
                )
    return curves


def _train(
    rank: Rank,
    method: Callable[[DistributedDataParallel, torch.optim.Optimizer], torch.optim.Optimizer],
    task: tuple[Images, torch.nn.Module, torch.optim.Optimizer, Loss],
    steps: int,
    seed: int,
) -> list[dict[str, float]]:
    images, network, optimizer, loss = task
    ddp = DistributedDataParallel(network)
    optimizer = method(ddp, optimizer)
    batches = _batches(len(images.y), seed)
    curve: list[dict[str, float]] = []
    seconds = megabytes = 0.0
    for first in range(0, steps, max(1, steps // EVALUATIONS)):
        dist.barrier()
        sent, start = rank.bytes_sent(), time.perf_counter()
        last = min(steps, first + max(1, steps // EVALUATIONS))
        for _ in range(first, last):
            share = next(batches)[rank.rank :: rank.ranks]
            optimizer.zero_grad()
            loss(ddp(images.x[share]), images.y[share]).backward()
            optimizer.step()
        seconds += time.perf_counter() - start
        dist.barrier()
        megabytes += (rank.bytes_sent() - sent) / 1e6
        if rank.rank == 0:
            found = accuracy(network, images.x_test, images.y_test)
            curve.append({"step": last, "seconds": seconds, "MB sent": megabytes, "accuracy": found})
    return curve


def _batches(count: int, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // BATCH * BATCH].split(BATCH)


def measure_training(
    links: Sequence[str],
    ranks: Sequence[int],
    models: Sequence[str],
    methods: Sequence[str],
    steps: int,
    seeds: int,
    data_dir: Path | None,
    threads: int = 1,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows, one for each method, and the curves behind them.

    "accuracy" is that after all steps; "at s" the last one known when the fastest method has made all its steps, at
    which time each method has made "steps then".
    """
    rows, points = [], []
    for link in links:
        for count in ranks:
            with SlowLink(link, count) as net:
                print(f"{link}, {count} ranks: {net.note}", file=sys.stderr)
                for model in models:
                    curves = net.run(train, model, tuple(methods), steps, seeds, data_dir, threads)[0]
                    head = {"link": net.link, "ranks": count, "model": model}
                    rows += _summarise(curves, head)
                    points += [
                        head | {"method": name, "seed": seed} | point
                        for (name, seed), curve in curves.items()
                        for point in curve
                    ]
    return rows, points


def _summarise(curves: dict[tuple[str, int], list[dict[str, float]]], head: dict[str, Any]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for name, _ in curves))
    of_name = {name: [curve for (key, _), curve in curves.items() if key == name] for name in names}
    time_limit = min(statistics.median(curve[-1]["seconds"] for curve in of_name[name]) for name in names)
    rows = []
    for name in names:
        ends = [curve[-1] for curve in of_name[name]]
        then = [[point for point in curve if point["seconds"] <= time_limit * 1.001] for curve in of_name[name]]
        row = head | {"method": name, "seeds": len(ends), "steps": ends[0]["step"]}
        row |= {key: statistics.fmean(end[key] for end in ends) for key in ("seconds", "MB sent")}
        row["accuracy"] = round(statistics.fmean(end["accuracy"] for end in ends), 2)
        row["at s"] = time_limit
        row["steps then"] = statistics.fmean(points[-1]["step"] if points else 0 for points in then)
        reached = [points[-1]["accuracy"] for points in then if points]
        row["accuracy then"] = round(statistics.fmean(reached), 2) if len(reached) == len(then) else ""
        rows.append(row)
    return rows


def draw_training(points: list[dict[str, Any]], path: Path) -> None:
    """Accuracy (seed 0) against steps, above, and against seconds, below; a column for each link, ranks and model."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((p["link"], p["ranks"], p["model"]) for p in points))
    figure = Figure(figsize=(5 * len(columns), 7))
    axes = figure.subplots(2, len(columns), squeeze=False)
    for column, key in enumerate(columns):
        chosen = [p for p in points if (p["link"], p["ranks"], p["model"]) == key and p["seed"] == 0]
        for row, x in enumerate(("step", "seconds")):
            for name in dict.fromkeys(p["method"] for p in chosen):
                line = [p for p in chosen if p["method"] == name]
                axes[row, column].plot([p[x] for p in line], [p["accuracy"] for p in line], ".-", label=name)
            axes[row, column].set(xlabel=x, ylabel="test accuracy, %")
            axes[row, column].grid(alpha=0.25)
        axes[0, column].set_title(f"{key[2]}, {key[0]}, {key[1]} ranks")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
