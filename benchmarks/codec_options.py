"""What each option of CompressionConfig does to size and error: ``python benchmarks/codec_options.py [--data-dir FOLDER]``.

Gaussian values, heavy tails (Student's t with 3 degrees of freedom), and layers of a trained perceptron and a small
convolutional network (MNIST, else scikit-learn's digits). Twice: at c = 5, and with as many levels as leave a sixth of
float32 (``ratio=6``), which shows what an option is worth at one size. Errors are relative to the standard deviation of
the values, the root mean square (of a channel's values to the channel's deviation, in the column of that name) and the
largest. Then each rule for the number of levels. Lossless: bits of float32 and of the same values rounded to bfloat16
and float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import print_rows
from trained_networks import RECIPES, largest_weight, load_images, prepare, train_convolutional, train_perceptron

import weight_compression as wc

RULES: dict[str, dict] = {
    "c = 5": {},
    "c = 6": {"floor_bits": 6.0},
    "bits = 4": {"bits": 4.0},
    "bits = 6": {"bits": 6.0},
    "bits = 8": {"bits": 8.0},
    "gradient_rms = 0.1, c = 7": {"gradient_rms": 0.1, "floor_bits": 7.0},
    "ratio = 6": {"ratio": 6.0},
    "ratio = 8": {"ratio": 8.0},
}
OPTIONS: dict[str, dict] = {
    "": {},
    "per_channel": {"per_channel": True},
    "group_size=64": {"group_size": 64},
    "group_size=256": {"group_size": 256},
    "clip_quantile=0.9999": {"clip_quantile": 0.9999},
    "clip_quantile=0.999": {"clip_quantile": 0.999},
    "clip_quantile=0.99": {"clip_quantile": 0.99},
}


def make_tensors(data_dir: Path | None, epochs: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    source, images = load_images(data_dir)
    tensors = {
        "gaussian": torch.randn(1000, 1000),
        "student t, 3": torch.distributions.StudentT(3.0).sample((1000, 1000)),
    }
    for name in ("standardised", "pixels"):
        recipe = RECIPES[name]
        *_, (network, _) = train_perceptron(prepare(images, recipe), recipe, epochs, seed=0)
        tensors[f"perceptron on {source}, {name}"] = largest_weight(network)
    network = train_convolutional(images, 200 * epochs, seed=0)
    tensors[f"convolutions on {source}"] = largest_weight(network)
    return tensors


def measure(x: torch.Tensor, rule: dict, option: dict) -> dict:
    payload = wc.compress(x, wc.CompressionConfig(**rule, **option))
    info = wc.payload_info(payload)
    error = wc.decompress(payload) - x
    channels = x.flatten(1)
    by_channel = error.flatten(1).square().mean(1).sqrt() / channels.std(1).clamp_min(1e-12)
    return {
        "levels": info.levels,
        "bits": info.bits_per_weight,
        "ratio": 32 / info.bits_per_weight,
        "rms error": float(error.square().mean().sqrt() / x.std()),
        "of a channel": float(by_channel.median()),
        "largest": float(error.abs().max() / x.std()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    tensors = make_tensors(options.data_dir, options.epochs)
    for title, rule in (("c = 5", {"floor_bits": 5.0}), ("ratio = 6", {"ratio": 6.0})):
        print(f"\n{title}")
        print_rows([
            {"values": name, "option": option, **measure(x, rule, how)}
            for name, x in tensors.items()
            for option, how in OPTIONS.items()
        ])  # fmt: skip
    print("\nrules for the number of levels; max_error of 1 % of the standard deviation")
    print_rows([
        {"values": name, "rule": rule, **measure(x, how, {})}
        for name, x in tensors.items()
        for rule, how in [*RULES.items(), ("max_error", {"max_error": 0.01 * float(x.std())})]
    ])  # fmt: skip
    print("\nlossless")
    rows = []
    for name, x in tensors.items():
        row: dict = {"values": name}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            payload = wc.compress(x.to(dtype), wc.CompressionConfig(lossless=True))
            bits = wc.payload_info(payload).bits_per_weight
            row[str(dtype).removeprefix("torch.")] = bits
            row["% " + str(dtype).removeprefix("torch.")] = 100 * bits / (8 * dtype.itemsize)
        rows.append(row)
    print_rows(rows)


if __name__ == "__main__":
    main()
