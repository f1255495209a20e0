"""A perceptron of 1,000 layers, width 50, on MNIST: one layer at a time, and end to end (thesis, section 6.1).

    python benchmarks/layerwise_deep_mlp.py --data-dir FOLDER
    python benchmarks/layerwise_deep_mlp.py --data-dir FOLDER --backpropagation

Plain layers: no skip connections, no normalisation, no identity in the initial weights (torch's default). Each layer trains
with a linear head on the features that the one below has made of all samples, which lie in memory. Printed: accuracies of
heads along the way; the last is predicted through all layers.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from layerwise_runs import Results, load_data, make_parser
from torch import nn

import layerwise as lw

WIDTH = 50


def main() -> None:
    parser = make_parser(__doc__, epochs=2)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--first", type=int, default=15, help="epochs of the first layer, which sees the pixels")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--backpropagation", action="store_true", help="end to end instead, at several learning rates")
    args = parser.parse_args()
    results = Results(args.out, "deep_mlp")
    for seed in range(args.seeds):
        data = load_data(args, "mnist", seed, batch_size=args.batch, flat=True)
        torch.manual_seed(seed)
        (train_end_to_end if args.backpropagation else train_greedily)(args, results, data, seed)


def make_model(layers: int) -> nn.Module:
    made: list[nn.Module] = []
    for i in range(layers):
        made += [nn.Linear(WIDTH if i else 784, WIDTH), nn.ReLU()]
    return nn.Sequential(*made, nn.Linear(WIDTH, 10))


def train_greedily(args: Any, results: Results, data: Any, seed: int) -> None:
    adam = lw.OptimizerSpec("adam", args.lr, milestones=(0.5, 0.75), gamma=0.2)
    method = lw.Method(
        "greedy",
        lambda n: lw.bottom_up(n, [args.first, args.epochs], feed="cached"),
        head=lw.LinearHead(),
        optimizer=adam,
    )
    model = make_model(args.layers)
    path = results.path.with_name(f"deep_mlp.{args.layers}.{seed}.pt")
    trainer = lw.LayerwiseTrainer(
        model,
        method,
        classes=10,
        cache=lw.FeatureCache(limit_bytes=1 << 27, deterministic=True, shuffle_batches=True),
        checkpoint=path,
        checkpoint_every=500,
    )
    start = time.perf_counter()
    trainer.fit(data.train, resume=True)
    seconds = time.perf_counter() - start
    places = sorted({0, 1, 9, 99, *range(249, args.layers, 250), args.layers - 1} & set(range(args.layers)))
    heads = {place + 1: 100 * trainer.evaluate(data.test, place) for place in places}
    for place, accuracy in heads.items():
        print(f"layer {place}: {accuracy:.2f} % of the test samples", flush=True)
    results.put(f"greedy, {args.layers} layers", seed, {"settings": vars_of(args), "heads": heads, "seconds": seconds})
    path.unlink(missing_ok=True)


def train_end_to_end(args: Any, results: Results, data: Any, seed: int) -> None:
    for lr in (1e-2, 1e-3, 1e-4):
        torch.manual_seed(seed)
        model = make_model(args.layers)
        spec = lw.OptimizerSpec("adam", lr)
        method = lw.Method("backpropagation", [lw.Stage(((0, args.layers - 1),), args.epochs)], optimizer=spec)
        trainer = lw.LayerwiseTrainer(model, method, classes=10)
        trainer.fit(data.train)
        row = {
            "settings": vars_of(args),
            "test": 100 * trainer.evaluate(data.test),
            "loss": trainer.history[-1]["loss"],
        }
        print(f"end to end, lr {lr}: {row['test']:.2f} %, loss {row['loss']:.3f}", flush=True)
        results.put(f"end to end, {args.layers} layers, lr {lr}", seed, row)


def vars_of(args: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, type(None))) and k != "only"}


if __name__ == "__main__":
    main()
