"""Averaging gradients between data-parallel workers over a slow link: step time, bytes on the wire, error.

``python benchmarks/bench_allreduce.py [--link 1gbit,100mbit] [--ranks 2] [--model 25m] [--method NAME,NAME]`` with links
100mbit, 1gbit, 10gbit, none; 2 to 4 ranks; models mlp, cnn, 25m, 100m. ``--train`` measures accuracy instead
(train_over_link.py). ``--json FILE`` and ``--plot FILE`` store the rows and their picture.

*Link.* slow_link.py: a network namespace a rank, veth pairs shaped by ``tc tbf``, real TCP; needs root, without which the
ranks run on loopback and the rows say ``none``. "link Mbit/s" is the payload rate that raw sockets reach, all ranks
sending and receiving at once, before the methods are measured.

*Models.* Shapes of the 784-392-50-10 perceptron, a small convolutional network, ResNet-50 (25.6M parameters) and a
transformer (101M). The gradients are synthetic (`gradient_exchange.Gradients`) and given: there is no forward or backward
pass in the time.

*Methods.* ``all_reduce`` rows average one flat tensor; ``DDP`` rows run torch's communication hooks as a user gets them:
a backward pass copies the gradients into buckets of 25 MB, which are exchanged as they fill. "no exchange" is what DDP
itself takes. Ratios are against the float32 and bfloat16 of the same way.

*A step* starts at a barrier and ends when the slowest rank holds the averages. The first steps, while DDP rebuilds its
buckets and PowerSGD does not code yet, are not timed; the last of them is verified: relative error against the float64
mean, over all parameters and in the worst tensor, and whether all ranks hold the same bits. Then the methods take turns, a
step each (beyond 30M parameters, where memory is short, each makes its steps at a stretch); the median counts. "cpu ms"
is processor time of the busiest rank: far under the step's, the rank waits for the link or for a core, which the ranks and
the kernel's work for the link share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradient_exchange as exchange
import torch
import torch.distributed as dist
from common import Skipped, machine, print_rows
from slow_link import RATES, Rank, SlowLink, measure_throughput
from train_over_link import draw_training, measure_training

WAYS = {"all_reduce": exchange.ALL_REDUCE, "DDP": exchange.HOOKS}
WARM_UP = {"all_reduce": 1, "DDP": exchange.FIRST_CODED_STEP + 1}
ROUNDS, SECONDS = (
    (3, 50),
    4.0,
)  # timed steps of a method: the fewest, the most, and in between as many as take this long
TOGETHER = 30_000_000  # parameters up to which there is memory for all methods at once

Key = tuple[str, str]  # way, method


def measure(rank: Rank, model: str, wanted: Sequence[str], seconds: float) -> dict[str, Any]:
    """In each rank's process: this rank's measurements of every wanted method."""
    torch.set_num_threads(threads_of(rank.ranks))
    throughput = measure_throughput(rank)
    gradients = exchange.Gradients(model, rank.rank)
    keys = [(way, name) for way, methods in WAYS.items() for name in methods if not wanted or name in wanted]
    groups = [keys] if gradients.flat.numel() <= TOGETHER else [[key] for key in keys]
    methods: dict[Key, dict[str, Any]] = {}
    for group in groups:
        methods |= _measure_interleaved(rank, group, gradients, seconds * len(group))
    return {"throughput": throughput, "parameters": gradients.flat.numel(), "methods": methods}


def threads_of(ranks: int) -> int:
    return max(1, (os.cpu_count() or 1) // ranks)


def _measure_interleaved(
    rank: Rank, keys: Sequence[Key], gradients: exchange.Gradients, seconds: float
) -> dict[Key, dict[str, Any]]:
    """The methods in turn, a step each, so that a busy spell of the machine falls on all."""
    made: dict[Key, exchange.Exchange] = {}
    results: dict[Key, dict[str, Any]] = {}
    for way, name in keys:
        make = exchange.make_all_reduce if way == "all_reduce" else exchange.make_ddp
        prepare, step = made[way, name] = make(WAYS[way][name], gradients)
        for _ in range(max(WARM_UP[way], exchange.WARM_UP.get(name, 0))):
            prepare()
            averages = step()
        results[way, name] = {
            "errors": gradients.errors(averages, rank.ranks) if rank.rank == 0 else None,
            "digest": exchange.digest(averages),
            **{key: [] for key in ("seconds", "processor", "bytes")},
        }
    rounds, begin = 0, time.perf_counter()
    while _another(rank, rounds, time.perf_counter() - begin, seconds):
        for key, (prepare, step) in made.items():
            prepare()
            dist.barrier()
            sent, start, processor = rank.bytes_sent(), time.perf_counter(), time.process_time()
            step()
            results[key]["seconds"].append(time.perf_counter() - start)
            results[key]["processor"].append(time.process_time() - processor)
            dist.barrier()  # what this rank has sent has arrived
            results[key]["bytes"].append(rank.bytes_sent() - sent)
        rounds += 1
    if rank.rank == 0:
        for (way, name), result in results.items():
            middle = 1e3 * statistics.median(result["seconds"])
            print(f"{way} {name}: {middle:.4g} ms, {rounds} steps", file=sys.stderr)
    return results


def _another(rank: Rank, done: int, elapsed: float, seconds: float) -> bool:
    """Whether there is another round: rank 0 decides."""
    go_on = done < ROUNDS[0] or (done < ROUNDS[1] and elapsed < seconds)
    decision = torch.tensor([int(go_on and rank.rank == 0)])
    dist.all_reduce(decision)
    return bool(decision)


def make_rows(ranks: list[dict[str, Any]], head: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each method, from what the ranks measured."""
    measured: dict[Key, dict[str, Any]] = {}
    for key in ranks[0]["methods"]:
        of_ranks = [rank["methods"][key] for rank in ranks]
        slowest = [1e3 * max(times) for times in zip(*(r["seconds"] for r in of_ranks), strict=True)]
        measured[key] = {
            "times": torch.tensor(slowest, dtype=torch.float64),
            "bytes": max(statistics.median(r["bytes"]) for r in of_ranks),
            "processor": 1e3 * max(statistics.median(r["processor"]) for r in of_ranks),
            "errors": of_ranks[0]["errors"],
            "equal": len({r["digest"] for r in of_ranks}) == 1,
        }
    rows = []
    for (way, name), one in measured.items():
        low, middle, high = torch.quantile(one["times"], torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        row: dict[str, Any] = head | {
            "link Mbit/s": min(rank["throughput"] for rank in ranks) / 1e6,
            "way": way, "method": name, "steps": len(one["times"]),
            "ms": middle, "20%": low, "80%": high, "MB sent": one["bytes"] / 1e6,
            "bits/parameter": 8 * one["bytes"] / ranks[0]["parameters"],
        }  # fmt: skip
        for base in ("float32", "bfloat16"):
            peer = measured.get((way, base))
            row[f"x {base}"] = float(peer["times"].quantile(0.5)) / middle if peer else ""
            row[f"fewer than {base}"] = peer["bytes"] / one["bytes"] if peer else ""
        error, worst = one["errors"]
        row |= {"error": error, "worst tensor": worst, "ranks equal": "yes" if one["equal"] else "no"}
        rows.append(row | {"cpu ms": one["processor"]})
    return rows


def run(
    quick: bool = False,
    links: Sequence[str] | None = None,
    ranks: Sequence[int] = (2,),
    models: Sequence[str] | None = None,
    methods: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows of every link (default: 1gbit, 100mbit), number of ranks and model (mlp, cnn, 25m); `methods`: those alone.

    `quick`: fewer steps; by default 1gbit and mlp.
    """
    if not sys.platform.startswith("linux"):
        raise Skipped("its links and counters need Linux")
    links = links or (("1gbit",) if quick else ("1gbit", "100mbit"))
    models = models or (("mlp",) if quick else ("mlp", "cnn", "25m"))
    rows = []
    for link in links:
        for count in ranks:
            with SlowLink(link, count) as net:
                print(f"{link}, {count} ranks: {net.note}", file=sys.stderr)
                for model in models:
                    print(f"{model}:", file=sys.stderr)
                    head = {"link": net.link, "ranks": count, "model": model, "threads": threads_of(count)}
                    rows += make_rows(net.run(measure, model, tuple(methods), SECONDS / (4 if quick else 1)), head)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Step time by method: a panel for each model and number of ranks, a colour for each link."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    links = list(dict.fromkeys(row["link"] for row in rows))
    panels = list(dict.fromkeys((row["model"], row["ranks"]) for row in rows))
    names = list(dict.fromkeys((row["way"], row["method"]) for row in rows))[::-1]
    figure = Figure(figsize=(2.5 + 4 * len(panels), 1.2 + 0.32 * len(names)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for index, link in enumerate(links):
            of_link = {
                (r["way"], r["method"]): r for r in rows if (r["model"], r["ranks"]) == panel and r["link"] == link
            }
            shown = [i for i, name in enumerate(names) if name in of_link]
            middle = [of_link[names[i]]["ms"] for i in shown]
            reach = [[abs(of_link[names[i]][q] - of_link[names[i]]["ms"]) for i in shown] for q in ("20%", "80%")]
            height = 0.8 / len(links)
            y = [i + 0.4 - (index + 0.5) * height for i in shown]
            axis.barh(y, middle, height, xerr=reach, label=link, color=f"C{index}", error_kw={"lw": 0.8})
        axis.set(xscale="log", xlabel="ms per step", title=f"{panel[0]}, {panel[1]} ranks")
        axis.set_yticks(range(len(names)), [" ".join(name) for name in names])
        axis.grid(axis="x", alpha=0.25)
    axes[-1].legend(title="link")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _listed(choices: Sequence[Any], kind: type = str) -> Any:
    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if unknown := [value for value in values if value not in choices]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(map(str, choices))}")
        return values

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(dict.fromkeys([*exchange.ALL_REDUCE, *exchange.HOOKS, *exchange.TRAINING]))
    parser.add_argument("--link", type=_listed(list(RATES)), help=", ".join(RATES))
    parser.add_argument("--ranks", type=_listed((2, 3, 4), int), default=[2], help="2 to 4")
    parser.add_argument("--model", type=_listed(list(exchange.MODELS)), help=", ".join(exchange.MODELS))
    parser.add_argument("--method", type=_listed(names), default=[], help=", ".join(names))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--train", action="store_true", help="accuracy over steps and seconds")
    parser.add_argument("--steps", type=int, default=600, help="of --train, of 100 images over all ranks")
    parser.add_argument("--seeds", type=int, default=1, help="of --train")
    parser.add_argument("--data-dir", type=Path, help="of --train: folder of MNIST's IDX files; default: digits")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    options = parser.parse_args()
    print(machine())
    if options.train:
        rows, curves = measure_training(
            options.link or ["1gbit"], options.ranks, options.model or ["mlp"], options.method, options.steps,
            options.seeds, options.data_dir,
        )  # fmt: skip
    else:
        rows, curves = run(options.quick, options.link, options.ranks, options.model, options.method), []
    print_rows(rows)
    if options.json:
        record = {"machine": machine(), "load average": os.getloadavg()[0], "rows": rows, "curves": curves}
        options.json.write_text(json.dumps(record, indent=1))
    if options.plot:
        draw_training(curves, options.plot) if options.train else draw(rows, options.plot)


if __name__ == "__main__":
    main()
