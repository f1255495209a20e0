"""What every benchmark shares: this machine's measured ceilings, and timing of several candidates turn by turn."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

from platonic_core import _C

QUANTILES = (0.2, 0.5, 0.8)


class Skipped(Exception):
    """A benchmark cannot run here, because data, a peer or a device is absent; the message says which."""


def time_interleaved(
    candidates: dict[str, Callable[[], Any]], *, rounds: int = 15, min_time: float = 0.02
) -> dict[str, tuple[float, float, float]]:
    """20th, 50th and 80th percentile of every candidate's seconds per call.

    The candidates are timed in turn, `rounds` times over, so that a busy spell of the machine falls on all of them.
    A measurement repeats the call until it lasts `min_time` seconds. All run on ``torch.get_num_threads()`` threads.
    """
    threads = torch.get_num_threads()
    timers = {name: Timer("f()", globals={"f": call}, num_threads=threads) for name, call in candidates.items()}
    repeats = {}
    for name, timer in timers.items():
        once = timer.timeit(1).mean  # warms up
        once = timer.timeit(1).mean if once < 1 else once
        repeats[name] = max(1, int(min_time / max(once, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(repeats[name]).mean)
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    quantiles = {name: torch.quantile(torch.tensor(v, dtype=torch.float64), at) for name, v in seconds.items()}
    return {name: tuple(q.tolist()) for name, q in quantiles.items()}


def copy_call(size: int, device: str = "cpu") -> tuple[Callable[[], Any], int]:
    """A call that copies `size` bytes, and the bytes that it moves (read and written)."""
    source = torch.zeros(max(size // 4, 1), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * 4


def copy_bandwidth(size: int = 256 << 20, device: str = "cpu", rounds: int = 9) -> float:
    """Bytes per second, read and written, of a copy between two arrays of `size` bytes."""
    call, moved = copy_call(size, device)
    return moved / time_interleaved({"copy": call}, rounds=rounds)["copy"][1]


def fma_call(dtype: torch.dtype, device: str = "cpu", size: int = 1024) -> tuple[Callable[[], Any], float]:
    """A call that multiplies two square matrices, and its floating-point operations (a multiply-add is two)."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3


def fma_rate(dtype: torch.dtype, device: str = "cpu", rounds: int = 9) -> float:
    """Floating-point operations per second of the library's matrix product."""
    call, work = fma_call(dtype, device)
    return work / time_interleaved({"mm": call}, rounds=rounds)["mm"][1]


def machine() -> dict[str, Any]:
    """What a table of results must name."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            processor = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": processor,
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A plain table: a column a key, numbers to three digits."""
    if not rows:
        return
    names = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    for line in [names, *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
