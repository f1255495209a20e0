"""k-filtering before training: the checkerboard of section 5.4.2 of the thesis, table 5.1, and what the filter costs.

``python benchmarks/layerwise_filtering.py checkerboard|table|speed [--figures] [--quick]``; *table* and *speed* need
``--data-dir FOLDER`` with MNIST's four IDX files. Finished trainings are kept in a JSON file and not repeated.

*checkerboard*: 5,000 points of 8 x 8 squares. The thesis finds that no multilayer perceptron learns all of them by
backpropagation (51 to 53 %), and that one learns the k-filtered points; its points are in [-0.5, 0.5]^2, but it gives neither
network nor settings nor k. So here two perceptrons learn all points, and those left by k = 10, in that range and in
[-2, 2]^2, by SGD with and without momentum and by Adam, each for the same number of updates at a rate that falls to 0 by a
cosine. The first rate of every combination is the one of a grid at which a first training fits its own points best; then other
first weights are trained with it. There is no test set: what is asked for is how well the points are fitted. Accuracy on all
5,000 points is shown beside it. ``--figures`` draws figures 5.15 and 5.16.

*table*, table 5.1: a convolutional network of four layers learns what k-filtering leaves of MNIST's training images, for k = 5
to 27, the neighbours taken from all images and from random parts of at most 6,148, and, as a control, random images in the
same number. The settings were not tuned: Adam at 1e-3, falling to 0 by a cosine, batches of 100, no augmentation; the
accuracy is the one after the last epoch.

*speed*: k_redundant for seven k at once on all of MNIST, against scikit-learn's neighbours and against half the time of a matrix
product of all pairs, which is the least that exact distances by products take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Skipped, fma_rate, machine, print_rows
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.nn import functional as F
from trained_networks import Images, load_images

from layerwise import k_filter, k_redundant
from platonic.datasets import make_checkerboard
from platonic_core.figures import new_figure, save_figure
from platonic_core.files import write_atomically

FOLDER = Path(__file__).resolve().parent
KS = (5, 10, 20, 24, 25, 26, 27)
PART = 6148
TABLE_5_1 = {5: (18, 97.17), 10: (34, 99.43), 20: (53, 99.50), 24: (57, 99.55)}  # kept, accuracy of the CNN-4, %
BASELINE_5_1 = 99.54


class Record:
    """Results by the name of what was done, in a JSON file that grows with each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {"machine": machine(), "results": {}}
        if path.exists():
            self.content = json.loads(path.read_text())

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of that name, made if it is not in the file."""
        known = self.content["results"]
        if name not in known:
            begin = time.perf_counter()
            known[name] = make()
            write_atomically(self.path, json.dumps(self.content, indent=1).encode())
            print(f"{name}: {known[name]} ({time.perf_counter() - begin:.0f} s)", flush=True)
        return known[name]


# ---- the checkerboard ----


@dataclass(frozen=True)
class Optimizer:
    make: Callable[[list[Tensor], float], torch.optim.Optimizer]
    rates: tuple[float, ...]


OPTIMIZERS = {
    "SGD": Optimizer(lambda p, rate: torch.optim.SGD(p, rate), (0.03, 0.1, 0.3, 1.0)),
    "momentum 0.9": Optimizer(lambda p, rate: torch.optim.SGD(p, rate, momentum=0.9), (0.01, 0.03, 0.1)),
    "Adam": Optimizer(lambda p, rate: torch.optim.Adam(p, rate), (1e-3, 3e-3, 1e-2)),
}
NETWORKS = {"2-50-2": (50,), "2-128-128-128-2": (128, 128, 128)}
RANGES = (0.5, 2.0)  # of the coordinates, on both sides of 0
BOARD_BATCH = 100


def load_board(reach: float = 0.5) -> tuple[Tensor, Tensor]:
    """Points in [-reach, reach]^2 and their classes."""
    board = make_checkerboard()
    return torch.from_numpy(board.X_train).float() * reach, torch.from_numpy(board.y_train)


class Perceptrons(nn.Module):
    """As many networks as there are seeds, side by side, with ReLU and torch's own first weights."""

    def __init__(self, hidden: Sequence[int], seeds: Sequence[int]) -> None:
        super().__init__()
        sizes = (2, *hidden, 2)
        nets = []
        for seed in seeds:
            torch.manual_seed(seed)
            nets.append([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
        layers = list(zip(*nets, strict=True))
        self.weights = nn.ParameterList(torch.stack([layer.weight.detach().T for layer in same]) for same in layers)
        self.biases = nn.ParameterList(torch.stack([layer.bias.detach()[None] for layer in same]) for same in layers)

    def forward(self, x: Tensor) -> Tensor:
        """Points (m, 2) to scores (seeds, m, 2)."""
        h = x.expand(len(self.weights[0]), *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h.relu() if i else h, weight)
        return h


def train_board(
    x: Tensor, y: Tensor, hidden: Sequence[int], optimizer: str, rate: float, seeds: Sequence[int], updates: int
) -> Perceptrons:
    """Networks after so many updates; all seeds see the same batches."""
    nets = Perceptrons(hidden, seeds)
    steps = OPTIMIZERS[optimizer].make(list(nets.parameters()), rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(steps, updates)
    batches = endless_batches(len(x), BOARD_BATCH, torch.Generator().manual_seed(0))
    for _, batch in zip(range(updates), batches, strict=False):
        scores = nets(x[batch])
        steps.zero_grad()
        losses = F.cross_entropy(scores.flatten(0, 1), y[batch].repeat(len(seeds)), reduction="sum")
        (losses / len(batch)).backward()  # a sum over networks: each gets its own gradient
        steps.step()
        falling.step()
    return nets


def endless_batches(m: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(m, generator=generator).split(size)


@torch.no_grad()
def accuracies(nets: Perceptrons, x: Tensor, y: Tensor) -> list[float]:
    """In %, one per seed."""
    return (100 * (nets(x).argmax(2) == y).double().mean(1)).tolist()


def checkerboard(record: Record, seeds: int, updates: int, k: int) -> list[dict[str, Any]]:
    x, y = load_board()
    sets = {"all": torch.arange(len(x)), f"k = {k}": k_filter(x, y, k)}
    rows = []
    for (network, hidden), reach, (optimizer, choice), (points, kept) in itertools.product(
        NETWORKS.items(), RANGES, OPTIMIZERS.items(), sets.items()
    ):
        x, y = load_board(reach)

        def fit(rate: float, numbers: Sequence[int]) -> dict[str, list[float]]:
            nets = train_board(x[kept], y[kept], hidden, optimizer, rate, numbers, updates)  # noqa: B023
            return {"own": accuracies(nets, x[kept], y[kept]), "all": accuracies(nets, x, y)}  # noqa: B023

        name = f"{network}, {optimizer}, {points} in +-{reach:g}, {updates} updates"
        tried = {
            rate: record.get(f"{name}, rate {rate:g}, seed 0", partial(fit, rate, [0]))["own"][0]
            for rate in choice.rates
        }
        rate = max(tried, key=tried.__getitem__)
        numbers = range(1, seeds + 1)
        found = record.get(f"{name}, rate {rate:g}, seeds 1 to {seeds}", partial(fit, rate, numbers))
        row = {
            "network": network,
            "range": reach,
            "optimizer": optimizer,
            "rate": rate,
            "points": points,
            "of 5,000": len(kept),
        }
        rows.append({**row, "fit of them, %": spread(found["own"]), "fit of all, %": spread(found["all"])})
    return rows


def spread(values: Sequence[float], digits: int = 1) -> str:
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def draw_board(k: int, folder: Path) -> None:
    """Figure 5.15: all points and those that k-filtering leaves. Figure 5.16: what the loss's gradient by each point is."""
    x, y = load_board()
    kept = k_filter(x, y, k)
    figure = new_figure(9.0, 4.4)
    for axes, (points, title) in zip(
        figure.subplots(1, 2), ((torch.arange(len(x)), "all points"), (kept, f"k-filtered, k = {k}")), strict=True
    ):
        draw_points(axes, x[points], y[points])
        axes.set_title(f"{title}: {len(points):,}")
    save_figure(figure, folder / "figure_5_15.png")

    from matplotlib.patches import Rectangle  # only for the figure

    hidden, optimizer, rate, updates = (50,), "SGD", 0.3, 2000
    figure = new_figure(13.0, 4.6)
    left, middle, right = figure.subplots(1, 3)
    field = input_gradients(train_board(x, y, hidden, optimizer, rate, [0], updates), x, y)
    filtered = input_gradients(train_board(x[kept], y[kept], hidden, optimizer, rate, [0], updates), x[kept], y[kept])
    window = strongest_window(x, field)
    draw_arrows(left, x, field, y)
    draw_arrows(middle, x[window], field[window], y[window])
    draw_arrows(right, x[kept], filtered, y[kept])
    low, high = x[window].amin(0).tolist(), x[window].amax(0).tolist()
    middle.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    left.add_patch(Rectangle(low, high[0] - low[0], high[1] - low[1], fill=False, lw=1.2))
    left.set_title("all points")
    middle.set_title("all points: the window on the left")
    right.set_title(f"k-filtered, k = {k}")
    figure.suptitle(
        f"Minus the gradient of the loss by the input: 2-50-2 with ReLU after {updates:,} updates by {optimizer}, rate {rate:g}"
    )
    save_figure(figure, folder / "figure_5_16.png")


def strongest_window(x: Tensor, arrows: Tensor) -> Tensor:
    """Which points lie in that square of side 0.25 on a diagonal in which the arrows are longest on the whole."""
    lengths = arrows.norm(dim=1)
    centres = [(c, sign * c) for c in torch.linspace(-0.375, 0.375, 25).tolist() for sign in (1, -1)]
    windows = [((x - torch.tensor(centre)).abs() < 0.125).all(1) for centre in centres]
    return max(windows, key=lambda window: lengths[window].sum().item())


def input_gradients(nets: Perceptrons, x: Tensor, y: Tensor) -> Tensor:
    """Minus the gradient of every point's loss by its coordinates (m, 2)."""
    x = x.clone().requires_grad_()
    F.cross_entropy(nets(x)[0], y, reduction="sum").backward()
    assert x.grad is not None
    return -x.grad


COLOURS = ("#3f90da", "#bd1f01")


def draw_points(axes: Any, x: Tensor, y: Tensor) -> None:
    axes.scatter(*x.T.numpy(), s=3, c=[COLOURS[i] for i in y.tolist()], lw=0)
    frame(axes)


def draw_arrows(axes: Any, x: Tensor, arrows: Tensor, y: Tensor) -> None:
    axes.quiver(*x.T.numpy(), *arrows.T.numpy(), color=[COLOURS[i] for i in y.tolist()], angles="xy", width=0.0022)
    frame(axes)


def frame(axes: Any) -> None:
    axes.set(xlim=(-0.5, 0.5), ylim=(-0.5, 0.5), aspect="equal")
    axes.set_xticks([-0.5, 0, 0.5])
    axes.set_yticks([-0.5, 0, 0.5])


# ---- table 5.1 ----


def make_cnn4() -> nn.Sequential:
    """Three convolutions, each with batch normalisation and pooling, and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 32), (32, 64)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 3 * 3, 10))


def train_cnn4(images: Images, kept: Tensor, epochs: int, seed: int, device: str) -> float:
    """Test accuracy in % after the last epoch."""
    torch.manual_seed(seed)
    network = make_cnn4().to(device)
    x, x_test = (part.view(-1, 1, images.side, images.side) for part in (images.x, images.x_test))
    x, y = x[kept].to(device), images.y[kept].to(device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 100))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        found = torch.cat([network(part.to(device)).argmax(1).cpu() for part in x_test.split(1000)])
    return 100 * (found == images.y_test).double().mean().item()


def table_5_1(
    record: Record, images: Images, ks: Sequence[int], epochs: int, seeds: int, device: str
) -> list[dict[str, Any]]:
    x, y = images.x, images.y
    generator = torch.Generator().manual_seed(0)
    whole, parts = k_filter(x, y, ks), k_filter(x, y, ks, batch=PART, generator=generator)
    subsets: list[tuple[str, int | str, Tensor]] = [("", "none", torch.arange(len(x)))]
    for k, from_all, from_parts in zip(ks, whole, parts, strict=True):
        subsets += [(f"parts of {PART:,}", k, from_parts), ("all", k, from_all)]
        for kept in (from_parts, from_all):
            subsets.append(("random images", k, torch.randperm(len(x), generator=generator)[: len(kept)].sort().values))
    rows = []
    for neighbours, k, kept in subsets:
        name = f"{neighbours or 'all images'}, k = {k}, {len(kept)} images, {epochs} epochs"
        found = [
            record.get(f"{name}, seed {seed}", partial(train_cnn4, images, kept, epochs, seed, device))
            for seed in range(seeds)
        ]
        row: dict[str, Any] = {"neighbours among": neighbours, "k": k, "kept, %": round(100 * len(kept) / len(x), 1)}
        row["test accuracy, %"] = spread(found, 2)
        if k == "none":
            row["thesis's"] = BASELINE_5_1
        elif neighbours.startswith("parts") and k in TABLE_5_1:
            row |= dict(zip(("thesis kept, %", "thesis's"), TABLE_5_1[k], strict=True))
        rows.append(row)
    return rows


# ---- speed ----


def speed(images: Images, ks: Sequence[int], samples: int) -> list[dict[str, Any]]:
    x, y = images.x[:samples], images.y[:samples]

    def by_sklearn() -> Tensor:
        neighbours = (
            NearestNeighbors(n_neighbors=max(ks), algorithm="brute").fit(x.numpy()).kneighbors(return_distance=False)
        )
        same = y[torch.from_numpy(neighbours)] == y[:, None]
        return torch.stack([same[:, :k].all(1) for k in ks])

    seconds: dict[str, list[float]] = {"k_redundant": [], "scikit-learn's brute force": []}
    found = {}
    for _ in range(3):
        for name, call in zip(seconds, (lambda: k_redundant(x, y, ks), by_sklearn), strict=True):
            begin = time.perf_counter()
            found[name] = call()
            seconds[name].append(time.perf_counter() - begin)
    ours, theirs = found.values()
    rate = fma_rate(torch.float32)
    floor = len(x) ** 2 * x.shape[1] / rate  # half of the pairs, a multiplication and an addition per feature
    rows = [{"": name, "seconds": median(s), "of the floor": median(s) / floor} for name, s in seconds.items()]
    rows.append(
        {"": f"half a matrix product at the measured {rate / 1e9:.0f} GFLOP/s", "seconds": floor, "of the floor": 1.0}
    )
    print(f"{len(x):,} images of {x.shape[1]} pixels, k = {', '.join(map(str, ks))}, {torch.get_num_threads()} threads")
    print(
        f"{int((ours != theirs).sum())} of {ours.numel()} answers differ from those by scikit-learn's float32 distances"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("checkerboard", "table", "speed"))
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files")
    parser.add_argument("--seeds", type=int, help="trainings of every setting, 5 or 3 by default")
    parser.add_argument("--updates", type=int, default=10_000, help="of every perceptron on the checkerboard")
    parser.add_argument("--epochs", type=int, default=10, help="of every convolutional network")
    parser.add_argument("--samples", type=int, help="speed: the first so many images, all by default")
    parser.add_argument("--quick", action="store_true", help="a look: few updates, images and epochs, one seed")
    parser.add_argument(
        "--figures", action="store_true", help="draw figures 5.15 and 5.16 instead of training by the grid"
    )
    parser.add_argument("--k", type=int, default=10, help="of the filter on the checkerboard")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where convolutional networks train")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the JSON file")
    parser.add_argument("--out", type=Path, default=FOLDER.parent / "docs" / "figures", help="folder of the figures")
    options = parser.parse_args()
    for folder in (options.results, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # momentum of units that no point reaches
    record = Record(options.results / f"layerwise_filtering_{options.part}{'_quick' if options.quick else ''}.json")
    if options.part == "checkerboard":
        if options.figures:
            draw_board(options.k, options.out)
            return
        seeds, updates = (1, 500) if options.quick else (options.seeds or 5, options.updates)
        print_rows(checkerboard(record, seeds, updates, options.k))
        return
    try:
        name, images = load_images(options.data_dir)
    except Skipped as reason:
        raise SystemExit(str(reason)) from None
    if name != "MNIST":
        raise SystemExit("table and speed need --data-dir with MNIST's four IDX files")
    if options.quick:
        images = Images(images.x[:6000], images.y[:6000], images.x_test[:1000], images.y_test[:1000])
    if options.part == "speed":
        print_rows(speed(images, KS, options.samples or len(images.x)))
    else:
        epochs, seeds = (1, 1) if options.quick else (options.epochs, options.seeds or 3)
        print_rows(table_5_1(record, images, KS[:2] if options.quick else KS, epochs, seeds, options.device))


if __name__ == "__main__":
    main()
