"""Gradient-amplification losses, forward and backward, against torch's cross-entropy and a measured copy.

`python benchmarks/bench_gradamp.py [--quick]`. Losses of logits count one read and one write of them ("of copy": share
of the bandwidth of a copy of that size, timed in turn); the fused last layer is beside the unfused one, with the memory
that each takes beyond its inputs and returned gradients. One thread on the CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from common import time_interleaved

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


def measure_layer(n: int, d: int, c: int, device: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=device, requires_grad=True)
    weight = (torch.randn(c, d, device=device) * 0.02).requires_grad_()
    bias = torch.zeros(c, device=device, requires_grad=True)
    target = torch.randint(c, (n,), device=device)
    inputs = (hidden, weight, bias)

    def step(loss: Any) -> Any:
        return waiting(lambda: torch.autograd.grad(loss(), inputs), device)

    def fused() -> torch.Tensor:
        return gradamp.linear_exp_ga(hidden, weight, bias, target)

    def unfused() -> torch.Tensor:
        return gradamp.exp_ga(F.linear(hidden, weight, bias), target)

    def cross_entropy() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), target)

    for ours, theirs in zip(torch.autograd.grad(fused(), inputs), torch.autograd.grad(unfused(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    candidates = {
        "linear_exp_ga": step(fused),
        "linear, exp_ga": step(unfused),
        "linear, cross_entropy": step(cross_entropy),
    }
    beyond = {name: memory_beyond(call, inputs, device) for name, call in candidates.items()}
    times = time_interleaved(candidates, rounds=rounds)
    return [
        {
            "what": name, "shape": f"{n}x{d}x{c}", "ms": 1e3 * seconds[1], "p20 ms": 1e3 * seconds[0],
            "p80 ms": 1e3 * seconds[2], "x unfused": times["linear, exp_ga"][1] / seconds[1],
            "memory of logits": beyond[name] / (4 * n * c) if beyond[name] is not None else "unknown",
        }
        for name, seconds in times.items()
    ]  # fmt: skip


def memory_beyond(call: Any, inputs: tuple[torch.Tensor, ...], device: str) -> float | None:
    """Bytes at the peak beyond what was there before and the returned gradients; None where the system does not tell."""
    returned = sum(t.nbytes for t in inputs)
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before - returned
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the peak
        before = resident("VmRSS")
        call()
        return max(0.0, resident("VmHWM") - before - returned)
    except OSError:
        return None


def resident(field: str) -> float:
    with open("/proc/self/status") as file:
        return next(1024.0 * int(line.split()[1]) for line in file if line.startswith(field + ":"))


if __name__ == "__main__":
    for row in run("--quick" in sys.argv):
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
