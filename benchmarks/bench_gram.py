"""gram against the BLAS route (centre chunks of rows, multiply, add in float64) over shapes, dtypes and threads.

`python benchmarks/bench_gram.py [--quick]`. The rows behind `platonic._ops.use_gram_kernel`, losses included.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch.utils.benchmark import Timer

from platonic import _ops

CHUNK = 8192
TARGETS = 10
SHAPES = [(8, 0), (16, 0), (32, 0), (64, 0), (128, 0), (256, 0), (512, 0), (1024, 0)]
LAYERS = [(8, 16), (16, 64), (32, 32), (64, 128), (256, 128), (784, 64), (784, 256)]  # n, h


def by_blas(x, y, weight=None, bias=None):
    """[z | y]'s centred moments as chunked products, the layer's output in memory."""
    z = x if weight is None else torch.relu_(torch.addmm(bias, x, weight))
    v = torch.cat([z, y], 1)
    shift, p = v[:CHUNK].mean(0), v.shape[1]
    moments, sums = torch.zeros(p, p, dtype=torch.float64), torch.zeros(p, dtype=torch.float64)
    for start in range(0, len(v), CHUNK):
        part = v[start : start + CHUNK] - shift
        moments += part.T @ part
        sums += part.sum(0)
    return moments - torch.outer(sums, sums / len(v))


def by_kernel(x, y, weight=None, bias=None):
    return _ops.gram(x, y, weight=weight, bias=bias, activation="identity" if weight is None else "relu").gram


def percentiles(timers: dict[str, Timer], rounds: int) -> dict[str, list[float]]:
    """(20, 50, 80 %) of each timer's seconds, the timers taking turns so that all see the same load."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {name: torch.quantile(torch.tensor(t, dtype=torch.float64), points).tolist() for name, t in times.items()}


def measure(rows: int, n: int, h: int, dtype: torch.dtype, threads: int, rounds: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, c, generator=generator).to(dtype) for c in (n, TARGETS))
    layer = ()
    if h:
        layer = (
            torch.randn(n, h, generator=generator).to(dtype) / n**0.5,
            torch.randn(h, generator=generator).to(dtype),
        )
    torch.set_num_threads(threads)
    a, b = by_kernel(x, y, *layer), by_blas(x, y, *layer)
    assert (a - b).abs().max() < 1e-4 * b.diagonal().max()
    timers = {
        name: Timer("f(x, y, *layer)", globals={"f": f, "x": x, "y": y, "layer": layer}, num_threads=threads)
        for name, f in (("kernel", by_kernel), ("blas", by_blas))
    }
    times = percentiles(timers, rounds)
    p = (h or n) + TARGETS
    seconds = times["kernel"][1]
    return {
        "rows": rows, "n": n, "h": h, "dtype": str(dtype).removeprefix("torch."), "threads": threads,
        "kernel_s": seconds, "kernel_p20_s": times["kernel"][0], "kernel_p80_s": times["kernel"][2],
        "blas_s": times["blas"][1], "ratio": times["blas"][1] / seconds,
        "gflops": rows * (p * (p + 1) + 2 * n * h) / seconds / 1e9,
        "gbytes_per_s": rows * (n + TARGETS) * x.element_size() / seconds / 1e9,
        "dispatched": _ops.use_gram_kernel(rows, p, dtype, n if h else 0),
    }  # fmt: skip


def run(quick: bool = False) -> list[dict]:
    before = torch.get_num_threads()
    sizes = [4096] if quick else [512, 4096, 32768]
    shapes = [(32, 0), (128, 0), (64, 128)] if quick else SHAPES + LAYERS
    grid = itertools.product([1, 2], [torch.float32, torch.float64], sizes, shapes)
    try:
        return [measure(m, n, h, dtype, threads, 5 if quick else 15) for threads, dtype, m, (n, h) in grid]
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    for row in run("--quick" in sys.argv):
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
