"""Deep layer-wise learning within a share of backpropagation's memory, on a vision transformer or a residual network.

    python benchmarks/layerwise_budget.py --data-dir FOLDER --keep-heads                     # MNIST, ViT of 8 blocks
    python benchmarks/layerwise_budget.py --data-dir FOLDER --network resnet50 --width 1 --epochs 100 --device cuda

Backpropagation and `dll`, or with `--size 2` its segments, with the same optimiser (AdamW, a rate that falls to 0 by a cosine),
batches and epochs (dll: per window), each at three learning rates, of which validation chooses; `--augment` shifts the images of
both. Both keep the best weights by validation. A window's head is thrown away when the next one begins, or else, with
`--keep-heads`, counts to the end; with `--chain-patience`, the best one's is kept and the chain ends there. The budget holds
everything: weights, gradients, the optimiser's state, activations, head, feednet, batch. Peaks are measured: on CUDA by the
allocator, elsewhere by counting storages.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from layerwise_runs import Case, Results, backpropagation, chosen, load_data, make_parser, run_case, summary

import layerwise as lw
from layerwise import zoo
from layerwise.data import Augmentation, Loaders

MNIST: dict[str, Any] = {"in_channels": 1, "image_size": 28}
NETWORKS: dict[str, dict[str, Any]] = {"vit": {"depth": 8, "patch": 7}, "resnet50": {}}
RATES = (3e-4, 1e-3, 3e-3)


def cases(args: Any) -> dict[str, list[Case]]:
    """By way of training, a case for each rate."""
    make = partial(zoo.make, args.network, width=args.width, **NETWORKS[args.network], **MNIST)
    units = len(lw.split(make()))
    best = lw.Stopping(restore_best=True)
    ends = lw.Stopping(restore_best=True, chain_patience=args.chain_patience)
    layerwise = "dll" if args.size == 1 else f"dll, segments of {args.size}"
    if args.noise:
        layerwise += f", noise {args.noise:g}"
    if args.chain_patience:
        layerwise += f", ended by {args.chain_patience} without a gain"
    noise = lw.Regularisation(args.noise, gradient_dropout=args.noise)
    found: dict[str, list[Case]] = {"backpropagation": [], layerwise: []}
    for rate in RATES:
        adamw = lw.OptimizerSpec("adamw", rate, 0.01, decay="cosine")
        dll = lw.segments(
            args.size, args.size - 1, budget=args.budget, epochs=args.epochs, optimizer=adamw, lr_factor=1.0,
            weight_decay_factor=1.0, regularisation=noise, stopping=ends, max_channels=args.max_channels,
            keep_heads=args.keep_heads,
        )  # fmt: skip
        whole = backpropagation(args.epochs, adamw, units, stopping=best)
        for way, method in (("backpropagation", whole), (layerwise, dll)):
            found[way].append(
                Case(f"{args.network}, {'shifted, ' if args.augment else ''}{way}, rate {rate:g}", make, method)
            )
    return found


def peaks(trainer: lw.LayerwiseTrainer, data: Loaders) -> dict[str, Any]:
    """The largest window's measured and predicted bytes."""
    example = next(iter(data.train))[0]
    reports = {
        name: lw.memory_report(trainer.chain, trainer.method, example, data.classes, measure=measure)
        for name, measure in (("measured", True), ("predicted", False))
    }
    return {name: report.total for name, report in reports.items()}


def main() -> None:
    parser = make_parser(__doc__, epochs=10)
    parser.add_argument("--network", choices=NETWORKS, default="vit")
    parser.add_argument("--width", type=float, default=0.25, help="factor of all channels")
    parser.add_argument("--budget", type=float, default=0.3, help="share of backpropagation's memory")
    parser.add_argument("--size", type=int, default=1, help="units that train together, one of which is new")
    parser.add_argument("--noise", type=float, default=0.0, help="dropout between windows and of heads' gradients")
    parser.add_argument(
        "--chain-patience", type=int, help="windows in a row without a gain that end dll, at the best one"
    )
    parser.add_argument("--augment", action="store_true", help="shift images by up to 2 pixels")
    parser.add_argument("--keep-heads", action="store_true", help="of all windows, within the budget")
    parser.add_argument("--max-channels", type=int, help="most channels of a decision block")
    args = parser.parse_args()
    results = Results(args.out, "budget")
    settings = {key: getattr(args, key) for key in ("width", "epochs", "limit", "budget", "max_channels")}
    options = {"augmentation": Augmentation(crop=2)} if args.augment else {}
    table, whole = [], None
    ways = cases(args)
    wanted = chosen([case for made in ways.values() for case in made], args.only)
    for way, every in ways.items():
        made = [case for case in every if case in wanted]
        if not made:
            continue
        runs = [
            [
                run_case(results, case, s, load_data(args, "mnist", s, **options), settings, peaks)
                for s in range(args.seeds)
            ]
            for case in made
        ]
        best = max(runs, key=lambda rows: sum(max(row["validation"]) for row in rows))
        peak = max(row["measured"] for row in best)
        whole = whole or peak
        table.append(
            {
                "": way,
                "rate": made[runs.index(best)].name.rpartition(" ")[2],
                "test %": summary([row["test"] for row in best]),
                "all rates %": " ".join(summary([row["test"] for row in rows]) for rows in runs),
                "peak, MB": peak / 1e6,
                "of backpropagation's": peak / whole,
                "heads %": " ".join(f"{a:.2f}" for a in best[0]["heads"]),
                "seconds": sum(row["seconds"] for row in best) / len(best),
            }
        )
    print(lw.format_table(table))


if __name__ == "__main__":
    main()
