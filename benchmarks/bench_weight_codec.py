"""compress and decompress of a large float32 tensor, on one thread and on all, against torch's own quantiser with
zstandard at level 1 on the same number of levels, and against a copy of the tensor.

Verified first: every value within the error bound, the peer's too, payload within its bound. "all in": from the tensor to
the finished payload in new memory and back. The copy's bandwidth counts bytes read and written.
"""

from __future__ import annotations

import numpy as np
import torch
from common import Skipped, machine, print_rows, time_interleaved

import weight_compression as wc


def run(quick: bool = False) -> list[dict]:
    try:
        import zstandard
    except ImportError as error:
        raise Skipped("zstandard is not installed") from error
    threads = torch.get_num_threads()
    numel = (1 << 22) if quick else (1 << 26)
    rows = []
    try:
        for data in ("gaussian",) if quick else ("gaussian", "laplace", "uniform"):
            x = _draw(data, numel)
            for count in sorted({1, threads}):
                torch.set_num_threads(count)
                rows.append({"data": data, **_measure(x, count, zstandard, quick)})
    finally:
        torch.set_num_threads(threads)
    return rows


def _draw(data: str, numel: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if data == "gaussian":
        return torch.randn(numel, generator=generator) * 0.02
    uniform = torch.rand(numel, generator=generator)
    if data == "uniform":
        return uniform - 0.5
    sign = torch.randint(0, 2, (numel,), generator=generator) * 2.0 - 1
    return -0.01 * torch.log(uniform.clamp_min(1e-12)) * sign


def _measure(x: torch.Tensor, threads: int, zstandard, quick: bool) -> dict:
    payload = wc.compress(x)
    info = wc.payload_info(payload)
    out = torch.empty_like(x)
    wc.decompress(payload, out)
    if not float((out - x).abs().max()) <= info.error_bound + 2.0**-20 * float(x.abs().max()):
        raise AssertionError("a value is beyond the error bound")
    lo, hi = float(x.min()), float(x.max())
    # quint8 holds 256 levels: c = 5 gives at most 512, so uniform data have fewer there than here.
    levels = min(info.levels, 256)
    scale = (hi - lo) / (levels - 1)
    zero = round(-lo / scale)
    compressor = zstandard.ZstdCompressor(level=1, threads=0 if threads == 1 else threads)
    decompressor = zstandard.ZstdDecompressor()

    def their_encode() -> bytes:
        return compressor.compress(torch.quantize_per_tensor(x, scale, zero, torch.quint8).int_repr().numpy())

    def their_decode() -> torch.Tensor:
        symbols = torch.from_numpy(np.frombuffer(decompressor.decompress(theirs), np.uint8).copy())
        return torch._make_per_tensor_quantized_tensor(symbols, scale, zero).dequantize()

    theirs = their_encode()
    if not float((their_decode() - x).abs().max()) <= 0.51 * scale + 2.0**-20 * float(x.abs().max()):
        raise AssertionError("the peer's values are not its own")
    target = torch.empty_like(x)
    times = time_interleaved(
        {
            "encode": lambda: wc.compress(x),
            "decode": lambda: wc.decompress(payload, out),
            "decode new": lambda: wc.decompress(payload),
            "accumulate": lambda: wc.decompress(payload, out, accumulate=True, scale=0.5),
            "their encode": their_encode,
            "their decode": their_decode,
            "copy": lambda: target.copy_(x),
        },
        rounds=3 if quick else 7,
    )
    counts = torch.histc(x, info.levels).double()
    p = counts[counts > 0] / counts.sum()
    entropy = float(-(p * p.log2()).sum())
    giga = {name: x.numel() / middle / 1e9 for name, (_, middle, _) in times.items()}
    return {
        "threads": threads,
        "levels": info.levels,
        "bits": info.bits_per_weight,
        "over entropy %": 100 * (info.bits_per_weight / entropy - 1),
        "their bits": 8 * len(theirs) / x.numel(),
        "encode G/s": giga["encode"],
        "decode G/s": giga["decode"],
        "decode new G/s": giga["decode new"],
        "accumulate G/s": giga["accumulate"],
        "x their encode": giga["encode"] / giga["their encode"],
        "x their decode": giga["decode"] / giga["their decode"],
        "copy GB/s": 8 * giga["copy"],
    }


if __name__ == "__main__":
    print(machine())
    print_rows(run())
