"""Four losses on a perceptron and a small convolutional network: how fast they learn, and how far.

    python examples/gradient_amplification.py [--plots FOLDER] [--data-dir FOLDER]

The data are scikit-learn's digits (1,797 images of 8 x 8 pixels, a fifth of them the test), or MNIST from --data-dir.
Each loss gets the same tuning: one training for every learning rate of one grid, judged by the errors on a fifth of the
training images, averaged over the epochs. Then it is trained on the other four fifths with three seeds. Targets, alpha
and beta are those of table 4.2 of the thesis. Nothing is chosen by the test images.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

from gradamp import diagnostics, make_loss
from gradamp.losses import LOSSES
from platonic import datasets
from platonic_core.figures import new_figure, save_figure

RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
SEEDS = [0, 1, 2]
BATCH = 50


def make_perceptron(side):
    """Two hidden layers of ReLU, as in table 4.1 of the thesis, whose sizes MNIST gets."""
    widths = (392, 50) if side == 28 else (100, 50)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(side * side, widths[0]), nn.ReLU(),
        nn.Linear(widths[0], widths[1]), nn.ReLU(),
        nn.Linear(widths[1], 10),
    )  # fmt: skip


def make_convolutional(side):
    """Three convolutions with batch normalisation and one linear layer."""
    size = math.ceil(math.ceil(side / 2) / 2)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * size * size, 10),
    )  # fmt: skip


NETWORKS = {"perceptron": make_perceptron, "convolutional": make_convolutional}


def load_data(folder):
    """Images [N, 1, side, side] of mean 0 and deviation 1, classes: for training, validation and test."""
    data = datasets.load("digits") if folder is None else datasets.load("mnist", data_dir=folder)
    side = math.isqrt(data.X_train.shape[1])
    fitted, held_out, fitted_classes, held_out_classes = train_test_split(
        data.X_train, data.y_train, test_size=0.2, random_state=0, stratify=data.y_train
    )
    mean, deviation = fitted.mean(), fitted.std()

    def tensors(x, y):
        images = (torch.as_tensor(x, dtype=torch.float32) - mean) / deviation
        return images.view(-1, 1, side, side), torch.as_tensor(y, dtype=torch.int64)

    parts = ((fitted, fitted_classes), (held_out, held_out_classes), (data.X_test, data.y_test))
    return side, *(tensors(x, y) for x, y in parts)


def error_of(network, images, classes):
    """Misclassified images in per cent; all of them where training diverged."""
    network.eval()
    with torch.no_grad():
        logits = torch.cat([network(part) for part in images.split(1000)])
    network.train()
    if not bool(logits.isfinite().all()):
        return 100.0
    return 100 * float((logits.argmax(1) != classes).double().mean())


def train(make, side, name, rate, seed, fitted, judged, epochs, recorder_of=None):
    """Errors on `judged` after each epoch of gradient descent with momentum."""
    torch.manual_seed(seed)
    network, loss = make(side), make_loss(name)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9)
    recorder = recorder_of and recorder_of(network)
    images, classes = fitted
    errors = []
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss(network(images[batch]), classes[batch]).backward()
            optimizer.step()
        errors.append(error_of(network, *judged))
        if recorder is not None:
            recorder.end_epoch()
    if recorder is not None:
        recorder.close()
    return errors, recorder


def compare(make, side, fitted, validation, test, epochs, bar):
    """By loss: the learning rate, the test errors by epoch of every seed, and what a recorder saw of the first."""
    found = {}
    for name in LOSSES:
        scores = {}
        for rate in RATES:
            bar.update()
            scores[rate] = statistics.mean(train(make, side, name, rate, 0, fitted, validation, epochs)[0])
        rate = min(scores, key=scores.get)
        runs, recorders = [], []
        for seed in SEEDS:
            bar.update()
            watch = diagnostics.GradientRecorder if seed == SEEDS[0] else None
            errors, recorder = train(make, side, name, rate, seed, fitted, test, epochs, watch)
            runs.append(errors)
            recorders.append(recorder)
        found[name] = rate, runs, recorders[0]
    return found


def median_by_epoch(runs):
    return [statistics.median(errors) for errors in zip(*runs, strict=True)]


def print_table(title, found):
    # What every loss reaches, so that there is an epoch for each.
    reached = max(min(median_by_epoch(runs)) for _, runs, _ in found.values())
    print(f"\n{title}")
    print(f"{'loss':15}{'learning rate':>15}{f'epochs to {reached:.1f} %':>18}{'final error %':>15}{'lowest %':>10}")
    for name, (rate, runs, _) in found.items():
        errors = median_by_epoch(runs)
        first = 1 + next(i for i, error in enumerate(errors) if error <= reached)
        print(f"{name:15}{rate:15g}{first:18}{errors[-1]:15.2f}{min(errors):10.2f}")


def draw(folder, results):
    """Errors by epoch, and figures 4.2, 4.3 and 4.5 of the thesis for each network."""
    from matplotlib.ticker import LogLocator  # only for the plots

    folder.mkdir(parents=True, exist_ok=True)
    figure = new_figure(5.5 * len(results), 3.6)
    for panel, (title, found) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for name, (rate, runs, _) in found.items():
            errors = median_by_epoch(runs)
            panel.plot(range(1, len(errors) + 1), errors, label=f"{name}, rate {rate:g}")
        panel.set(title=title, xlabel="epoch", ylabel="test error, %, median of seeds", yscale="log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    save_figure(figure, folder / "errors.png")
    for title, found in results.items():
        recorders = {name: recorder for name, (_, _, recorder) in found.items()}
        last = len(next(iter(recorders.values())).layer_rms) - 1
        save_figure(
            diagnostics.plot_output_gradients(recorders, epochs=(0, min(3, last))),
            folder / f"{title}_output_gradients.png",
        )
        save_figure(diagnostics.plot_layer_rms(recorders), folder / f"{title}_layer_rms.png")
        save_figure(diagnostics.plot_softmax_normalizer(recorders), folder / f"{title}_softmax_normalizer.png")
    print(f"\nplots: {folder}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write the figures there as PNG")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # batches are too small for more
    side, fitted, validation, test = load_data(options.data_dir)
    trainings = len(NETWORKS) * len(LOSSES) * (len(RATES) + len(SEEDS))
    with tqdm(total=trainings, unit="training", disable=None) as bar:
        results = {
            title: compare(make, side, fitted, validation, test, options.epochs, bar)
            for title, make in NETWORKS.items()
        }
    for title, found in results.items():
        print_table(title, found)
    if options.plots is not None:
        draw(options.plots, results)


if __name__ == "__main__":
    main()
