"""What the engine of `layerwise` adds to a loop written by hand that does the same arithmetic.

`python benchmarks/bench_layerwise.py [--quick]`. An epoch of some batches of random images or vectors, by the trainer's
loop and by hand, in turn; verified first to give the same weights bit for bit. One thread on the CPU. Bar: 5 % for steps
of 5 ms and more.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, print_rows
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise as lw

CLASSES, BATCHES = 10, 20


def run(quick: bool = False, device: str = "cpu") -> list[dict[str, Any]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cases = [("mlp", 50), ("mlp", 400), ("cnn", 8), ("cnn", 32)]
        return [measure(kind, width, how, 3 if quick else 11, device) for kind, width in cases for how in METHODS]
    finally:
        torch.set_num_threads(before)


def make_model(kind: str, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(4):
        if kind == "mlp":
            layers += [nn.Linear(width if i else 784, width), nn.ReLU()]
        else:
            layers += [nn.Conv2d(width if i else 1, width, 3, padding=1), nn.ReLU()]
    top = [nn.Linear(width, CLASSES)]
    if kind == "cnn":
        top = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES)]
    return nn.Sequential(*layers, *top)


METHODS = {"bottom up, top unit": [lw.Stage(((3, 3),), 1)], "simultaneous": lw.simultaneous(4, 1)}
ADAM = lw.OptimizerSpec("adam", 1e-3)


class ByHand:
    """The same training, with nothing but torch."""

    def __init__(self, trainer: lw.LayerwiseTrainer, model: nn.Sequential, first: int) -> None:
        parts = [model[0:2], model[2:4], model[4:6], model[6:]]
        self.below, self.parts = parts[:first], parts[first:]
        heads = [copy.deepcopy(t.subnet.head) for t in trainer.trainings.values()]
        self.heads = heads
        self.optimizers = [
            torch.optim.Adam([*part.parameters(), *head.parameters()], lr=1e-3)
            for part, head in zip(self.parts, heads, strict=True)
        ]

    def epoch(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        for part in self.below:
            part.eval()
        for x, y in batches:
            with torch.no_grad():
                for part in self.below:
                    x = part(x)
            for part, head, optimizer in zip(self.parts, self.heads, self.optimizers, strict=True):
                h = part(x)
                F.cross_entropy(head(h), y).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                x = h.detach()


def measure(kind: str, width: int, how: str, rounds: int, device: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make_model(kind, width).to(device)
    shape = (256, 784) if kind == "mlp" else (64, 1, 28, 28)
    batches = [
        (torch.randn(shape, device=device), torch.randint(CLASSES, shape[:1], device=device)) for _ in range(BATCHES)
    ]
    stages = METHODS[how]
    mirror = copy.deepcopy(model)
    trainer = lw.LayerwiseTrainer(model, lw.Method(how, stages, optimizer=ADAM), classes=CLASSES, progress=False)
    for unit in trainer.chain:
        unit.freeze()
    trainings = [trainer.windows.enter(window, 1, batches) for window in stages[0].windows]
    hand = ByHand(trainer, mirror, stages[0].windows[0][0])
    epochs: dict[str, Callable[[], Any]] = {
        "engine": lambda: trainer.run_epoch(stages[0], trainings, batches, None),
        "hand": lambda: hand.epoch(batches),
    }
    for call in epochs.values():
        call()
    for a, b in zip(model.state_dict().values(), mirror.state_dict().values(), strict=True):
        assert torch.equal(a, b), "the engine does not do the loop's arithmetic"
    seconds: dict[str, list[float]] = {name: [] for name in epochs}
    for _ in range(rounds):
        for name, call in epochs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    step = statistics.median(seconds["hand"]) / BATCHES
    ratio = statistics.median(e / h for e, h in zip(seconds["engine"], seconds["hand"], strict=True))
    return {
        "model": f"{kind} {width}",
        "method": how,
        "step by hand, ms": 1e3 * step,
        "added, ms": 1e3 * step * (ratio - 1),
        "ratio": ratio,
        "met": ("yes" if ratio <= 1.05 else "no") if step >= 5e-3 else "",
    }


if __name__ == "__main__":
    print(machine())
    print_rows(run("--quick" in sys.argv))
