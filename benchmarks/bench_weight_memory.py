"""Peak extra memory of compress, decompress, save_file and load_file: 64M Gaussian float32 values, one process a case.

*Extra* is the highest resident memory during the call less the resident memory before it, when the values, the payload
and the given output exist already: what the call returns is in it, what it is given is not. The peak is the kernel's
VmHWM, set back before the call through ``/proc/self/clear_refs``; it counts the pages of mapped files too.

*Allowed*: compress 1.3 times the payload and a byte a value, two for more than 256 levels; decompress its output and
nothing else; save_file as compress; load_file the output and the file's mapped pages. `SLACK` is for the allocator's
huge pages and what a first call loads.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from common import machine, peak_memory, print_result, print_rows, run_in_process

import weight_compression as wc

SLACK = 8 << 20
CASES = ("compress", "decompress new", "decompress out", "accumulate", "save_file", "load_file")
FLOORS = (5.0, 6.0)  # of Gaussian values: about 200 and 400 levels


def run(quick: bool = False) -> list[dict]:
    numel = (1 << 22) if quick else (1 << 26)
    return [run_in_process(__file__, case, floor, numel, torch.get_num_threads()) for floor in FLOORS for case in CASES]


def measure_case(case: str, floor: float, numel: int) -> dict:
    """In a process of its own."""
    config = wc.CompressionConfig(floor_bits=floor)
    small = wc.compress(torch.randn(1 << 16), config)  # starts threads, loads what is loaded late
    wc.decompress(small)
    x = torch.empty(numel).normal_(generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.wcz"
        wc.save_file({"w": torch.randn(1 << 16)}, path, config)
        wc.load_file(path)
        payload = None if case in ("compress", "save_file") else wc.compress(x, config)
        if case == "load_file":
            wc.save_file({"w": x}, path, config)
        if case in ("decompress new", "load_file"):
            del x  # what it held is returned to the system, so that the output cannot hide in it
        calls = {
            "compress": lambda: wc.compress(x, config),
            "decompress new": lambda: wc.decompress(payload),
            "decompress out": lambda: wc.decompress(payload, x),
            "accumulate": lambda: wc.decompress(payload, x, accumulate=True, scale=0.5),
            "save_file": lambda: wc.save_file({"w": x}, path, config),
            "load_file": lambda: wc.load_file(path),
        }
        result, extra = peak_memory(calls[case])
        del result
        info = wc.payload_info(wc.compress(x, config) if payload is None else payload)
    symbol = 1 if info.levels <= 256 else 2
    output = 4 * numel
    allowed = {
        "compress": 1.3 * info.bytes + symbol * numel,
        "save_file": 1.3 * info.bytes + symbol * numel,
        "decompress new": output,
        "load_file": output + info.bytes,
    }.get(case, 0)
    return {
        "call": case,
        "values": numel,
        "levels": info.levels,
        "payload MB": info.bytes / 1e6,
        "extra MB": extra / 1e6,
        "allowed MB": allowed / 1e6,
        "extra / payload": extra / info.bytes,
        "extra bytes/value": extra / numel,
        "met": "yes" if extra <= allowed + SLACK else "no",
    }


def main() -> None:
    if len(sys.argv) == 1:
        print(machine())
        print_rows(run())
        return
    case, floor, numel, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print_result(lambda: measure_case(case, float(floor), int(numel)))


if __name__ == "__main__":
    main()
