"""Which training gives the thesis's bit rates: the perceptron of section 3.1, trained in several ways it may have been.

``python benchmarks/weight_recipes.py --data-dir FOLDER [--epochs 30] [--only "NAME; NAME"] [--in-loop]``. An epoch takes
about 2 s on one core. The thesis does not state the first weights, the step, decay, the inputs' scale, or whether training
went on from the exact weights or from what compression leaves of them ("in the loop": c = 5 for the column of c = 5, a
second training with c = 6 for that of c = 6). Its means are over 100 epochs.

Weights without biases, a range per layer (algorithm 1), M = 4, F = 3 %; "one range": all weights as one tensor (section
3.2); "c=6 of c=5's": the weights of the training for c = 5, which in the loop are on its bins' centres, compressed with
c = 6. Test accuracy is printed, not used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import Skipped, print_rows
from trained_networks import RECIPES, Images, Recipe, accuracy, load_images, prepare, train_perceptron
from weight_figures import bits_per_weight

import weight_compression as wc

FLOORS = (5, 6)
THESIS = {
    "recipe": "thesis, 100 epochs", "c=5 log2 levels": 6.8, "c=5": 3.55, "c=6": 3.78, "c=6 less c=5": 0.23,
}  # fmt: skip


def measure(images: Images, recipe: Recipe, epochs: int, loop: float | None = None) -> dict[str, float]:
    """Means over the epochs, and the last epoch's rates; `loop` is the c that training goes on with."""
    rows = []
    images = prepare(images, recipe)
    for epoch, (network, _) in enumerate(train_perceptron(images, recipe, epochs, seed=0)):
        if epoch == 0:
            continue
        if loop is not None:
            _quantise_in_place(network, loop)
        weights = [p.detach() for p in network.parameters() if p.ndim == 2]
        row = {"accuracy": accuracy(network, images.x_test, images.y_test)}
        for c in FLOORS:
            config = wc.CompressionConfig(floor_bits=c)
            payloads = dict(enumerate(wc.compress(w, config) for w in weights))
            row[f"c={c}"] = bits_per_weight(payloads)
            row[f"c={c} log2"] = bits_per_weight(payloads, huffman=False)
            together = wc.compress(torch.cat([w.flatten() for w in weights]), config)
            row[f"one range c={c}"] = wc.payload_info(together).bits_per_weight
        first = weights[0]
        row["range / std"] = float((first.max() - first.min()) / first.std())
        # Its share of the layer in the fullest of 16 bins: dead pixels and little else where it is near 1.
        row["fullest bin"] = float(torch.histc(first, 16).max() / first.numel())
        rows.append(row)
    last = rows[-1]
    means = {key: float(np.mean([row[key] for row in rows])) for key in last}
    return means | {
        "last": [last["c=5"], last["c=6"]],
        **{k: last[k] for k in ("accuracy", "range / std", "fullest bin")},
    }


@torch.no_grad()
def _quantise_in_place(network: torch.nn.Module, floor: float) -> None:
    for parameter in network.parameters():
        wc.decompress(wc.compress(parameter, wc.CompressionConfig(floor_bits=floor)), parameter)


def describe(name: str, images: Images, epochs: int, in_loop: bool) -> dict:
    recipe = RECIPES[name]
    five = measure(images, recipe, epochs, 5.0 if in_loop else None)
    six = measure(images, recipe, epochs, 6.0) if in_loop else five
    return {
        "recipe": name + (", in the loop" if in_loop else ""),
        "inputs": "standardised" if recipe.standardised else "0 to 1",
        "start": f"{recipe.scale:g} {recipe.initial}",
        "rate": recipe.rate,
        "decay": recipe.decay,
        "accuracy": f"{five['accuracy']:.2f}",
        "c=5 log2 levels": five["c=5 log2"],
        "c=5": five["c=5"],
        "c=6": six["c=6"],
        "c=6 less c=5": six["c=6"] - five["c=5"],
        "c=6 of c=5's": five["c=6"],
        "last c=5": five["last"][0],
        "last c=6": six["last"][1],
        "one range c=5": five["one range c=5"],
        "one range c=6": six["one range c=6"],
        "range / std": five["range / std"],
        "fullest bin": five["fullest bin"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--only", help=f"of {'; '.join(RECIPES)}, separated by ;")
    parser.add_argument("--in-loop", action="store_true", help="train on from the compressed weights too")
    options = parser.parse_args()
    names = [name.strip() for name in options.only.split(";")] if options.only else list(RECIPES)
    if unknown := set(names) - set(RECIPES):
        raise SystemExit(f"unknown recipes {', '.join(sorted(unknown))}; there are {'; '.join(RECIPES)}")
    try:
        _, images = load_images(options.data_dir)
    except Skipped as reason:
        raise SystemExit(str(reason)) from None
    rows = [THESIS]
    for name in names:
        rows += [describe(name, images, options.epochs, loop) for loop in (False, True)[: 1 + options.in_loop]]
    print_rows(rows)


if __name__ == "__main__":
    main()
