"""Greedy layer-wise training of SimCNN on CIFAR-10 (Belilovsky et al. 2019, table 2), and pruning after each layer (section 4.3).

    python benchmarks/layerwise_greedy.py --data-dir FOLDER --width 0.25 --epochs 10 --seeds 3
    python benchmarks/layerwise_greedy.py --data-dir FOLDER --width 1 --epochs 50 --device cuda     # the paper's size

The paper's settings but for `--width` (a factor of all channels, the heads' included) and `--epochs` per layer, whose learning
rate drops after 30, 60 and 90 % of them (after 15, 30 and 45 of 50). Cases "simcnn1" to "simcnn3" have heads of k - 1 hidden
layers; "backpropagation1" and "backpropagation3" train the same networks end to end for as many epochs as one layer gets.
The paper's network of "simcnn1" is not that of the other two: it has a fifth layer, a second downsampling and twice the channels
throughout, four times at its end. "narrow1" trains the other two's network with the head of k = 1, for heads alone to differ.
"prune" removes half of each layer's filters once it is trained; "narrow" is the network that is left, trained end to end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerwise_runs import Case, Results, backpropagation, chosen, load_data, make_parser, run_case, summary
from torch import nn

import layerwise as lw
from layerwise import zoo

PAPER = {"simcnn1": (88.3, 88.4), "simcnn2": (90.4, 90.7), "simcnn3": (91.7, 92.8), "backpropagation1": (89.7, None),
         "prune": (87.6, None), "narrow": (87.5, None)}  # fmt: skip


def cases(width: float, epochs: int) -> list[Case]:
    def size(channels: int) -> int:
        return max(1, round(channels * width))

    drops: dict[str, Any] = {"milestones": (0.3, 0.6, 0.9), "absolute": False}
    sgd = replace(lw.greedy().optimizer, **drops)
    made = []
    for k, layers in ((1, 5), (2, 4), (3, 4)):
        method = lw.greedy(k, width=None if k == 1 else size(256), epochs=epochs)
        network = f"simcnn{k}"
        head = None if k == 1 else lw.ConvHead(k=k, width=size(256))

        def make(network: str = network, head: Any = head) -> nn.Module:
            return zoo.make(network, width=width, **({} if head is None else {"head": head}))

        made.append(Case(network, make, replace(method, optimizer=sgd)))
        if k != 2:
            made.append(Case(f"backpropagation{k}", make, backpropagation(epochs, sgd, layers)))

    def make_narrow1() -> nn.Module:
        return zoo.SimCNN(layers=4, channels=128, downsample=(2,), width=width)

    made.append(Case("narrow1", make_narrow1, replace(lw.greedy(1, epochs=epochs), optimizer=sgd)))

    def make_simcnn(layers: int, channels: int, hidden: int) -> nn.Module:
        head = lw.ConvHead(k=3, width=size(hidden))
        return zoo.SimCNN(layers=layers, channels=channels, downsample=(), head=head, width=width)

    greedy3 = replace(lw.greedy(3, width=size(128), epochs=epochs), optimizer=sgd)
    pruning = lw.Pruning(keep=0.5, epochs=max(1, round(0.4 * epochs)))
    made.append(Case("prune", lambda: make_simcnn(3, 128, 64), replace(greedy3, name="prune", pruning=pruning)))
    made.append(Case("narrow", lambda: make_simcnn(3, 64, 64), backpropagation(epochs, sgd, 3)))
    return made


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--width", type=float, default=0.25, help="factor of the paper's channels")
    args = parser.parse_args()
    results = Results(args.out, "greedy")
    settings = {"width": args.width, "epochs": args.epochs, "limit": args.limit}
    table = []
    for case in chosen(cases(args.width, args.epochs), args.only):
        rows = [
            run_case(results, case, seed, load_data(args, "cifar10", seed, validation=0), settings)
            for seed in range(args.seeds)
        ]
        paper, together = PAPER.get(case.name, (None, None))
        table.append(
            {
                "case": case.name,
                "test %": summary([row["test"] for row in rows]),
                "ensemble %": summary([row["ensemble"] for row in rows]) if len(rows[0]["heads"]) > 1 else "",
                "paper %": paper,
                "paper, ensemble %": together,
                "heads %": " ".join(f"{a:.1f}" for a in rows[0]["heads"]),
                "seconds": sum(row["seconds"] for row in rows) / len(rows),
            }
        )
    print(lw.format_table(table))


if __name__ == "__main__":
    main()
