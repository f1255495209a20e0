"""What every benchmark shares: this machine's measured ceilings, and timing of several candidates turn by turn."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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


def peak_memory(call: Callable[[], Any]) -> tuple[Any, int]:
    """What `call` returns, and the highest resident memory meanwhile less that before, in bytes.

    The peak is the kernel's VmHWM, set back through ``/proc/self/clear_refs``; it counts pages of mapped files too. Memory
    that was freed before but not returned to the system hides what takes its place: measure in a process of its own.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise Skipped("peak memory needs Linux's /proc")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise Skipped(f"the peak of memory cannot be set back: {error}") from error
    before = _resident("VmRSS")
    result = call()
    return result, _resident("VmHWM") - before


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(name + ":")).split()[1])


def run_in_process(file: str, *arguments: Any) -> dict[str, Any]:
    """What the benchmark `file` prints by :func:`print_result` when a fresh interpreter runs it with `arguments`."""
    command = [sys.executable, file, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[1:])}: {done.stderr}")
    result = json.loads(done.stdout)
    if "skipped" in result:
        raise Skipped(result["skipped"])
    return result


def print_result(measure: Callable[[], dict[str, Any]]) -> None:
    """The other end of :func:`run_in_process`."""
    try:
        result = measure()
    except Skipped as reason:
        result = {"skipped": str(reason)}
    json.dump(result, sys.stdout)


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
