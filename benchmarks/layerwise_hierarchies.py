"""PredSim on networks that downsample sooner or later (Ma et al. 2021, tables I, III and V).

    python benchmarks/layerwise_hierarchies.py --data-dir FOLDER --width 0.125 --epochs 15 --limit 20000 --seeds 3
    python benchmarks/layerwise_hierarchies.py --data-dir FOLDER --width 1 --epochs 400 --device cuda     # the paper's size

Every convolution is a unit with a local loss; the paper's settings but for width, epochs (the learning rate is quartered after
50, 75, 89 and 94 % of them), samples, and the probability of dropping a channel, which is the paper's times the width: what is
left of 8 channels without three tenths of them, layer after layer, is noise. Each network is trained by backpropagation too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from layerwise_runs import Case, Results, backpropagation, chosen, load_data, make_parser, run_case, summary
from torch import nn

import layerwise as lw
from layerwise import zoo

# Network, hierarchy: accuracies of the paper, layer-wise and global; learning rate; dropout.
PAPER = {
    ("resnet18", (2, 2, 2, 2)): (86.94, 92.45, 3e-4, 0.3),
    ("resnet18", (1, 1, 1, 1)): (89.26, 92.75, 3e-4, 0.3),
    ("resnet18", (2, 2, 1, 1)): (86.27, 92.39, 3e-4, 0.3),
    ("resnet18", (2, 1, 1, 1)): (87.61, 92.48, 3e-4, 0.3),
    ("resnet18", (1, 1, 2, 2)): (89.77, 93.01, 3e-4, 0.3),
    ("vgg8", (1, 1, 1, 1, 1)): (89.72, 90.59, 5e-4, 0.2),
    ("vgg11", (1, 1, 2, 2, 2)): (90.6, 91.6, 5e-4, 0.2),
    ("vgg16", (2, 2, 3, 3, 3)): (89.2, 92.03, 3e-4, 0.25),
    ("vgg19", (2, 2, 4, 4, 4)): (89.14, 92.21, 3e-4, 0.25),
}


def make_model(network: str, hierarchy: tuple[int, ...], width: float, dropout: float) -> nn.Module:
    return zoo.make(network, hierarchy=hierarchy, width=width, dropout=dropout, activation="leaky_relu")


def cases(width: float, epochs: int, lr_factor: float = 1.0) -> list[Case]:
    made = []
    for (network, hierarchy), (_, _, lr, dropout_at_full_width) in PAPER.items():
        dropout = dropout_at_full_width * min(width, 1.0)
        adam = lw.OptimizerSpec("adam", lr * lr_factor, milestones=(0.5, 0.75, 0.89, 0.94), gamma=0.25)
        name = f"{network} {list(hierarchy)}"
        predsim = replace(lw.predsim(dropout=dropout), schedule=partial(lw.simultaneous, epochs=epochs), optimizer=adam)
        plain = partial(
            make_model, network, hierarchy, width, 0.0
        )  # the trainer drops between units, behind the heads' taps
        spec = zoo.layer_names(plain())
        made.append(Case(f"{name} local", plain, predsim, spec))
        dropped = partial(make_model, network, hierarchy, width, dropout)
        made.append(
            Case(f"{name} global", dropped, backpropagation(epochs, adam, len(spec)), zoo.layer_names(dropped()))
        )
    return made


def main() -> None:
    parser = make_parser(__doc__, epochs=15)
    parser.add_argument("--width", type=float, default=0.125, help="factor of the paper's channels")
    parser.add_argument("--lr-factor", type=float, default=1.0, help="factor of the paper's learning rates")
    args = parser.parse_args()
    results = Results(args.out, "hierarchies")
    settings = {"width": args.width, "epochs": args.epochs, "limit": args.limit, "lr_factor": args.lr_factor}
    every = cases(args.width, args.epochs, args.lr_factor)
    if args.only is None:
        args.only = "; ".join(
            c.name for c in every if "[2, 2, 2, 2]" in c.name or ("[1, 1, 2, 2]" in c.name and "resnet" in c.name)
        )
    table: list[dict[str, Any]] = []
    for case in chosen(every, args.only):
        rows = [
            run_case(results, case, seed, load_data(args, "cifar10", seed, validation=0), settings)
            for seed in range(args.seeds)
        ]
        network, numbers = case.name.rsplit(" ", 1)[0].split(" ", 1)
        paper = PAPER[network, tuple(int(n) for n in numbers.strip("[]").split(","))]
        local = case.name.endswith("local")
        table.append(
            {
                "network": f"{network} {numbers}",
                "training": "local" if local else "global",
                "test %": summary([row["test"] for row in rows]),
                "paper %": paper[0 if local else 1],
                "heads %": " ".join(f"{a:.0f}" for a in rows[0]["heads"]) if local else "",
                "seconds": sum(row["seconds"] for row in rows) / len(rows),
            }
        )
    print(lw.format_table(table))


if __name__ == "__main__":
    main()
