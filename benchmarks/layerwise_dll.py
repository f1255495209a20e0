"""Deep layer-wise learning on MNIST: table 6.1, figures 6.2 and 6.3 and section 6.6.2 of the thesis.

    python benchmarks/layerwise_dll.py first --data-dir FOLDER --width 1       # table 6.1: CNN-4 and VGG-13
    python benchmarks/layerwise_dll.py segments --data-dir FOLDER              # figure 6.2: subnets of 1 to 4 blocks
    python benchmarks/layerwise_dll.py robin --data-dir FOLDER                 # bottom up, round robin, random robin, backprop
    python benchmarks/layerwise_dll.py dropout --data-dir FOLDER               # of the gradient from head to unit

`first`: SGD with a fixed learning rate of 0.05 and weight decay 8e-5, batches of 128, no augmentation, one affine decision
layer; the best weights of each layer by validation. The thesis trains 30, 40, 50, 60, 60, ... epochs; `--epochs N` means N for
backpropagation and 0.3, 0.4, 0.5, 0.6, ... of N for the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from layerwise_runs import Case, Results, backpropagation, chosen, load_data, make_parser, run_case, summary
from torch import nn

import layerwise as lw
from layerwise import zoo
from layerwise.probes import stable_ranks

MNIST: dict[str, Any] = {"in_channels": 1, "image_size": 28}
BEST = lw.Stopping(restore_best=True)
SGD = lw.OptimizerSpec("sgd", 0.05, 8e-5, {"momentum": 0.9})
PAPER = {"cnn4 backpropagation": 99.54, "cnn4 dll": 99.58, "vgg13 backpropagation": 99.60, "vgg13 dll": 99.65}


def first(args: Any) -> list[Case]:
    networks: dict[str, Callable[[], nn.Module]] = {
        "cnn4": partial(zoo.make, "cnn4", width=args.width, **MNIST),
        "vgg13": partial(zoo.make, "vgg13", width=args.width, **MNIST),
    }
    shares = [max(1, round(share * args.epochs)) for share in (0.3, 0.4, 0.5, 0.6)]
    dll = lw.Method(
        "dll",
        lambda n: lw.bottom_up(n, shares),
        head=lw.LinearHead(pool=7),
        optimizer=SGD,
        stopping=replace(BEST, chain_patience=4),
    )
    made = []
    for name, make in networks.items():
        units = len(lw.split(make()))
        made.append(Case(f"{name} backpropagation", make, backpropagation(args.epochs, SGD, units, stopping=BEST)))
        made.append(Case(f"{name} dll", make, dll))
    return made


def segments(args: Any) -> list[Case]:
    make = partial(zoo.make, "resnet18", width=args.width, **MNIST)
    units = len(lw.split(make()))
    adam = lw.OptimizerSpec("adam", 1e-3)
    made = [Case("backpropagation", make, backpropagation(args.epochs, adam, units))]
    for size in (1, 2, 3, 4):
        method = lw.Method(
            f"segments of {size}",
            partial(lw.sliding_windows, epochs=args.epochs, size=size, overlap=size - 1),
            head=lw.LinearHead(),
            optimizer=adam,
        )
        made.append(Case(method.name, make, method))
    return made


def robin(args: Any) -> list[Case]:
    make = partial(zoo.make, "vgg13", width=args.width, **MNIST)
    units = len(lw.split(make()))
    adam = lw.OptimizerSpec("adam", 1e-3, decay="cosine")  # so that what a unit sees comes to rest
    common: dict[str, Any] = {"head": lw.LinearHead(), "optimizer": adam}
    rounds = args.epochs // 2
    return [
        Case("backpropagation", make, backpropagation(args.epochs, adam, units)),
        Case("bottom up", make, lw.Method("bottom up", partial(lw.bottom_up, epochs=args.epochs), **common)),
        Case("round robin", make, lw.Method("round robin", partial(lw.robin, rounds=rounds, epochs=2), **common)),
        Case(
            "random robin",
            make,
            lw.Method("random robin", partial(lw.robin, rounds=rounds, epochs=2, shuffle=True), **common),
        ),
    ]


def dropout(args: Any) -> list[Case]:
    """Gradients that are kept, divided by 1 - p or not."""
    make = partial(zoo.make, "cnn4", width=args.width, **MNIST)
    noises = {"none": lw.Regularisation()}
    for p in (0.3, 0.5, 0.8):
        for rescale in (True, False):
            name = f"p = {p}, {'' if rescale else 'not '}rescaled"
            noises[name] = lw.Regularisation(gradient_dropout=p, rescale_gradient=rescale)
    return [
        Case(
            name, make, lw.Method(name, partial(lw.bottom_up, epochs=args.epochs), optimizer=SGD, regularisation=noise)
        )
        for name, noise in noises.items()
    ]


def ranks(trainer: lw.LayerwiseTrainer, _data: Any) -> dict[str, Any]:
    return {"stable ranks": [rank for unit in trainer.chain for rank in stable_ranks(unit).values()]}


EXPERIMENTS = {"first": first, "segments": segments, "robin": robin, "dropout": dropout}


def main() -> None:
    parser = make_parser(__doc__, epochs=10)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--width", type=float, default=0.25, help="factor of all channels")
    args = parser.parse_args()
    results = Results(args.out, f"dll_{args.experiment}")
    settings = {"width": args.width, "epochs": args.epochs, "limit": args.limit}
    table = []
    for case in chosen(EXPERIMENTS[args.experiment](args), args.only):
        extra = ranks if args.experiment == "robin" else None
        rows = [run_case(results, case, s, load_data(args, "mnist", s), settings, extra) for s in range(args.seeds)]
        table.append(
            {
                "case": case.name,
                "test %": summary([row["test"] for row in rows]),
                "thesis %": PAPER.get(case.name) if args.experiment == "first" else None,
                "heads %": " ".join(f"{a:.2f}" for a in rows[0]["heads"]),
                "stable ranks": " ".join(f"{r:.1f}" for r in rows[0].get("stable ranks", [])),
                "seconds": sum(row["seconds"] for row in rows) / len(rows),
            }
        )
    print(lw.format_table(table))


if __name__ == "__main__":
    main()
