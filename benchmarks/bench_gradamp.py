"""Gradient-amplification losses, forward and backward, against torch's cross-entropy and a measured copy.

`python benchmarks/bench_gradamp.py [--quick]`. Losses of logits count one read and one write of them ("of copy": share
of the bandwidth of a copy of that size, timed in turn); the fused last layer is beside the unfused one, with the memory
that each takes beyond its inputs and returned gradients, in a process of its own. One thread on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Skipped, machine, peak_memory, print_result, print_rows, run_in_process, time_interleaved

import gradamp
from gradamp import reference
from gradamp.amplifier import Amplifier

LOGITS = [(4096, 1000), (64, 21, 224, 224)]
LAYER = (4096, 512, 32000)  # samples, hidden units, classes


def run(quick: bool = False, device: str = "cpu") -> list[dict[str, Any]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shapes = [(1024, 1000), (4, 21, 224, 224)] if quick else LOGITS
        layer = (512, 128, 4000) if quick else LAYER
        rounds = 3 if quick else 11
        rows = [row for shape in shapes for row in measure_logits(shape, device, rounds)]
        return rows + measure_layer(*layer, device, 2 if quick else 5)
    finally:
        torch.set_num_threads(before)


def waiting(call: Any, device: str) -> Any:
    """`call`, and on a GPU the wait for its end."""
    if device == "cpu":
        return call
    return lambda: (call(), torch.cuda.synchronize())


def measure_logits(shape: tuple[int, ...], device: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    check(x[:8], target[:8])
    leaf, overwritten, copied = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.empty_like(x)

    def step(loss: Any, logits: torch.Tensor = leaf, **options: Any) -> Any:
        def call() -> None:
            logits.grad = None
            loss(logits, target, **options).backward()

        return waiting(call, device)

    candidates = {
        "copy": waiting(lambda: copied.copy_(x), device),
        "cross_entropy": step(F.cross_entropy),
        "exp_ga": step(gradamp.exp_ga),
        "exp_ga in place": step(gradamp.exp_ga, overwritten, inplace=True),
        "pow3_ga": step(gradamp.pow3_ga),
        "linear_mse": step(gradamp.linear_mse),
    }
    if device != "cpu":
        candidates["cross_entropy compiled"] = step(torch.compile(F.cross_entropy))
    times = time_interleaved(candidates, rounds=rounds)
    return [
        {
            "what": name, "shape": "x".join(map(str, shape)), "ms": 1e3 * seconds[1], "p20 ms": 1e3 * seconds[0],
            "p80 ms": 1e3 * seconds[2], "GB/s": 2 * x.nbytes / seconds[1] / 1e9,
            "of copy": times["copy"][1] / seconds[1], "x cross_entropy": times["cross_entropy"][1] / seconds[1],
        }
        for name, seconds in times.items()
    ]  # fmt: skip


def check(x: torch.Tensor, target: torch.Tensor) -> None:
    """Every loss's gradient is the reference's before anything is timed."""
    for loss, amplifier in (
        (gradamp.exp_ga, Amplifier("exp", alpha=0.5, target_values=(0.0, 2.0))),
        (gradamp.pow3_ga, Amplifier("pow3", alpha=0.001, target_values=(0.0, 2.0))),
        (gradamp.linear_mse, Amplifier("linear", target_values=(-1.0, 1.0))),
    ):
        logits = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(logits, target), logits)
        expected = reference.gradient(x, target, amplifier)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden units [N, D], weights [C, D], biases [C]
HEADS: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {
    "linear_exp_ga": lambda layer, target: gradamp.linear_exp_ga(*layer, target),
    "linear, exp_ga": lambda layer, target: gradamp.exp_ga(F.linear(*layer), target),
    "linear, exp_ga in place": lambda layer, target: gradamp.exp_ga(F.linear(*layer), target, inplace=True),
    "linear, cross_entropy": lambda layer, target: F.cross_entropy(F.linear(*layer), target),
}


def make_layer(n: int, d: int, c: int, device: str) -> tuple[Layer, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=device)
    weight = torch.randn(c, d, device=device).mul_(0.02)
    layer = (hidden.requires_grad_(), weight.requires_grad_(), torch.zeros(c, device=device, requires_grad=True))
    return layer, torch.randint(c, (n,), device=device)


def measure_layer(n: int, d: int, c: int, device: str, rounds: int) -> list[dict[str, Any]]:
    layer, target = make_layer(n, d, c, device)

    def step(name: str) -> Any:
        return waiting(lambda: torch.autograd.grad(HEADS[name](layer, target), layer), device)

    fused, unfused = (torch.autograd.grad(HEADS[name](layer, target), layer) for name in list(HEADS)[:2])
    for ours, theirs in zip(fused, unfused, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    del fused, unfused
    if device == "cpu":
        beyond = {name: process_memory_beyond(name, n, d, c) for name in HEADS}
    else:
        beyond = {name: cuda_memory_beyond(step(name), layer) for name in HEADS}
    times = time_interleaved({name: step(name) for name in HEADS}, rounds=rounds)
    return [
        {
            "what": name, "shape": f"{n}x{d}x{c}", "ms": 1e3 * seconds[1], "p20 ms": 1e3 * seconds[0],
            "p80 ms": 1e3 * seconds[2], "x unfused": times["linear, exp_ga"][1] / seconds[1],
            "MB beyond": beyond[name] / 1e6, "of logits": beyond[name] / (4 * n * c),
        }
        for name, seconds in times.items()
    ]  # fmt: skip


def cuda_memory_beyond(call: Any, layer: Layer) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in layer)


def process_memory_beyond(name: str, *sizes: int) -> float:
    try:
        return run_in_process(__file__, "memory", name, *sizes)["bytes"]
    except Skipped:
        return float("nan")  # the system does not tell


def memory_beyond(name: str, n: int, d: int, c: int) -> dict[str, Any]:
    """Bytes at the peak beyond the inputs and the returned gradients, in a process of its own."""
    torch.set_num_threads(1)
    small, few = make_layer(64, d, 512, "cpu")
    torch.autograd.grad(HEADS[name](small, few), small)  # loads what is loaded late
    layer, target = make_layer(n, d, c, "cpu")
    grads, extra = peak_memory(lambda: torch.autograd.grad(HEADS[name](layer, target), layer))
    return {"bytes": extra - sum(grad.nbytes for grad in grads)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        case, *sizes = sys.argv[2:]
        print_result(lambda: memory_beyond(case, *map(int, sizes)))
    else:
        print(machine())
        print_rows(run("--quick" in sys.argv))
