"""The thesis's chapter 3 with real workers: each trains on its part of MNIST, weights are averaged after every epoch.

``python benchmarks/averaging_mnist.py --data-dir FOLDER [--epochs 100] [--ranks 2] [--minutes M] [--recipe NAME]``; FOLDER
holds MNIST's four IDX files. Starts the ranks itself. All schemes start from the same weights, see the same batches and
advance side by side, an epoch each in turn; after every epoch `docs/figures/averaging_mnist.json` is written. An epoch of
the five schemes takes about 6 s on a core for every rank.

784-392-50-10 as in ``weight_figures.py``, whose recipe "pixels" gives the thesis's bit rates for exact training. Here it goes
on from what decoding gives. Bits per weight are those of the payloads that carry the mean, as in figure 3.5; bytes sent
are all that a rank sends, its part of adding up included.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import Skipped, machine, print_rows
from torch.distributed.algorithms.model_averaging import utils
from trained_networks import BATCH, RECIPES, accuracy, load_images, make_perceptron, prepare

import weight_compression as wc
from platonic_core.figures import new_figure, save_figure
from weight_compression.distributed import CompressedModelAverager

OUT = Path(__file__).parents[1] / "docs" / "figures" / "averaging_mnist.json"
EXACT = "float32"
SCHEMES: dict[str, tuple[str, int] | None] = {  # what is coded, c
    EXACT: None,
    "weights, c = 5": ("weights", 5),
    "weights, c = 6": ("weights", 6),
    "difference, c = 5": ("difference", 5),
    "difference, c = 6": ("difference", 6),
}
THESIS = {"weights, c = 5": (3.55, 9.01, None), "weights, c = 6": (3.78, 8.47, 10.32)}  # bits, ratio, effective
NEAR = 0.1  # points of accuracy below the exact scheme's best


class Worker:
    """A rank's network under one scheme."""

    def __init__(self, network: torch.nn.Sequential, scheme: tuple[str, int] | None, recipe) -> None:
        self.network = network
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=recipe.rate, momentum=recipe.momentum, weight_decay=recipe.decay
        )
        self.averager = None
        if scheme is not None:
            code, c = scheme
            self.averager = CompressedModelAverager(1, config=wc.CompressionConfig(floor_bits=c), code=code)
            self.averager.broadcast_parameters(network.named_parameters())

    def train(self, x: torch.Tensor, targets: torch.Tensor, batches: tuple[torch.Tensor, ...]) -> None:
        for batch in batches:
            self.optimizer.zero_grad()
            torch.nn.functional.mse_loss(self.network(x[batch]), targets[batch]).backward()
            self.optimizer.step()

    def average(self) -> dict[str, float]:
        """Bits per weight of the payloads that carry the mean, and bytes sent by this rank."""
        parameters = list(self.network.named_parameters())
        if self.averager is None:
            utils.average_parameters((p for _, p in parameters), dist.group.WORLD)
            ranks = dist.get_world_size()
            size = sum(p.numel() * p.element_size() for _, p in parameters)
            return {"bits": 32.0, "sent": 2 * (ranks - 1) * size // ranks}
        self.averager.average_parameters(parameters)
        step = self.averager.stats()["by_step"][-1]
        layers = step["layers"].values()
        bits = 8 * sum(layer["bytes"] for layer in layers) / sum(layer["numel"] for layer in layers)
        return {"bits": bits, "sent": step["bytes_sent"]}


def work(rank: int, ranks: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    recipe = RECIPES[options.recipe]
    images = prepare(load_images(options.data_dir)[1], recipe)
    x, y = images.x[rank::ranks], images.y[rank::ranks]
    targets = torch.full((len(y), 10), -1.0).scatter_(1, y[:, None], 1.0)
    first = make_perceptron(x.shape[1], recipe, torch.Generator().manual_seed(options.seed))
    workers = {name: Worker(copy.deepcopy(first), scheme, recipe) for name, scheme in SCHEMES.items()}
    shuffle = torch.Generator().manual_seed(options.seed * ranks + rank + 1)
    runs: dict[str, list[dict]] = {name: [] for name in SCHEMES}
    started = time.monotonic()
    for epoch in range(1, options.epochs + 1):
        batches = torch.randperm(len(x), generator=shuffle).split(BATCH)
        for name, worker in workers.items():
            worker.train(x, targets, batches)
            row = {"epoch": epoch, **worker.average()}
            if rank == 0:
                runs[name].append(row | {"accuracy": accuracy(worker.network, images.x_test, images.y_test)})
        if rank == 0:
            save(runs, ranks, options)
            print(f"epoch {epoch}: " + ", ".join(f"{n} {r[-1]['accuracy']:.2f}" for n, r in runs.items()), flush=True)
        late = torch.tensor(float(time.monotonic() - started > 60 * options.minutes))
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
        if late:
            break
    dist.destroy_process_group()


def save(runs: dict[str, list[dict]], ranks: int, options: argparse.Namespace) -> None:
    found = {"ranks": ranks, "recipe": options.recipe, "seed": options.seed, "machine": machine(), "runs": runs}
    partial = options.out.with_suffix(".tmp")
    partial.write_text(json.dumps(found, indent=None, separators=(",", ":")))
    os.replace(partial, options.out)


def summarise(runs: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """A row for every scheme. The effective reduction is of bytes until the epoch of the highest test accuracy."""
    exact = runs[EXACT]
    peak = _peak(exact)
    bar = exact[peak - 1]["accuracy"] - NEAR
    table = []
    for name, rows in runs.items():
        sent = np.cumsum([row["sent"] for row in rows])
        exactly_sent = np.cumsum([row["sent"] for row in exact])
        scores = [row["accuracy"] for row in rows]
        reached = next((i for i, score in enumerate(scores) if score >= bar), None)
        exactly_reached = next(i for i, row in enumerate(exact) if row["accuracy"] >= bar)
        bits = float(np.mean([row["bits"] for row in rows]))
        thesis = THESIS.get(name, ("", "", ""))
        table.append(
            {
                "scheme": name,
                "bits/weight": bits,
                "thesis bits": thesis[0],
                "32 / bits": 32 / bits,
                "thesis ratio": thesis[1],
                "bytes sent, x fewer": exactly_sent[-1] / sent[-1],
                "accuracy, last": f"{scores[-1]:.2f}",
                "mean of last 10": f"{np.mean(scores[-10:]):.2f}",
                "peak": f"{max(scores):.2f}",
                "peak epoch": _peak(rows),
                "effective, until peak": exactly_sent[peak - 1] / sent[_peak(rows) - 1],
                "thesis effective": thesis[2] or "",
                f"epochs to {bar:.2f} %": "never" if reached is None else reached + 1,
                "effective, until then": "" if reached is None else exactly_sent[exactly_reached] / sent[reached],
            }
        )
    return table


def _peak(rows: list[dict]) -> int:
    return 1 + int(np.argmax([row["accuracy"] for row in rows]))


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    figure = new_figure(11, 4)
    left, right = figure.subplots(1, 2)
    colours = ("black", "tab:blue", "tab:red", "tab:cyan", "tab:orange")
    for (name, rows), colour in zip(runs.items(), colours, strict=True):
        epochs = [row["epoch"] for row in rows]
        if name != EXACT:
            left.plot(epochs, [row["bits"] for row in rows], color=colour, label=name)
        if name in THESIS:
            left.axhline(THESIS[name][0], color=colour, ls=":", lw=0.8, label=f"{name}, thesis's mean")
        right.plot(epochs, [row["accuracy"] for row in rows], color=colour, label=name, lw=1)
    left.set(title="3.5, averaged by real workers: bits per weight", xlabel="epoch", ylabel="bits", ylim=(0, None))
    left.legend(fontsize=7, ncols=2)
    best = max(row["accuracy"] for row in runs[EXACT])
    right.set(title="test accuracy", xlabel="epoch", ylabel="%", ylim=(best - 3, best + 0.3))
    right.legend(fontsize=7)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after the epoch that exceeds them")
    parser.add_argument("--recipe", choices=RECIPES, default="pixels")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON; the plot gets its name and .png")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    try:
        load_images(options.data_dir)
    except Skipped as reason:
        raise SystemExit(str(reason)) from None
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(work, (options.ranks, store.port, options), nprocs=options.ranks)
    runs = json.loads(options.out.read_text())["runs"]
    print_rows(summarise(runs))
    draw(runs, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
